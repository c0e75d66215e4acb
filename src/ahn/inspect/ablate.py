"""`without`: memory off for some layers and heads, in writing, reading or both."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.cache.conversation import AHNCache
from ahn.cache.layer_context import LayerContext
from ahn.errors import AHNError
from ahn.inspect.memories import recurrent_layers, written_positions
from ahn.layout.evicted import Evicted
from ahn.layout.visibility import Visibility
from ahn.model.attached import observed
from ahn.model.observer import Observer, Passage


@contextlib.contextmanager
def without(
    model: PreTrainedModel,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    write: bool = False,
    read: bool = False,
    tokens: Tensor | None = None,
) -> Iterator[None]:
    """Inside the block the memory of some heads is off; without any restriction that is exactly sinks + window.

    Blocks may be nested; each takes its own heads away. While one is open, steps on a GPU are not captured graphs.

    Args:
        model: with a recurrent memory.
        layers: indices; None takes all. Every named layer loses the same heads.
        heads: indices; None takes all.
        write: False keeps what leaves the window during the block out of these heads' states (the gates of a token
            are closed, so the state does not decay either). Query heads that share states lose them together.
        read: False adds nothing from these heads' states. A norm over all heads (Mamba2) still counts them.
        tokens: (L,) bool by position: only these are kept out (`write=False, read=True`); others are written.

    Raises:
        AHNError: the model has no recurrent memory, or none in such a layer or head; or `tokens` without
            `write=False, read=True`. In the block: a token leaves the window that `tokens` says nothing of.
    """
    memories = recurrent_layers(model)
    chosen = tuple(memories) if layers is None else tuple(layers)
    if absent := [index for index in chosen if index not in memories]:
        raise AHNError(f"Layer {absent[0]} has no memory; layers {', '.join(map(str, memories))} have.")
    count = next(iter(memories.values())).heads
    taken = tuple(range(count)) if heads is None else tuple(heads)
    if beyond := [head for head in taken if not 0 <= head < count]:
        raise AHNError(f"There is no head {beyond[0]}; the memory has heads 0 to {count - 1}.")
    if tokens is not None and (write or not read):
        raise AHNError("`tokens` chooses what is not written: pass write=False and read=True with it.")
    with observed(model, _Ablation(frozenset(chosen), list(taken), write, read, tokens), first=True):
        yield


@dataclasses.dataclass(eq=False)
class _Ablation(Observer):
    layers: frozenset[int]
    heads: list[int]
    write: bool
    read: bool
    tokens: Tensor | None
    kept_out: Tensor | None = None
    """(B or 1, m) of the tokens that leave in the forward under way; None for all."""

    def begin(self, cache: AHNCache | None, view: Visibility) -> None:
        if self.tokens is None:
            return
        positions = written_positions(view)
        if positions.numel() and int(positions.max()) >= len(self.tokens):
            raise AHNError(
                f"Position {int(positions.max())} leaves the window, but `tokens` has {len(self.tokens)} entries."
            )
        self.kept_out = self.tokens.to(positions.device)[positions.clamp_min(0)]

    def writing(self, layer: LayerContext, left: Evicted) -> Evicted:
        if self.write or layer.index not in self.layers:
            return left
        gates, memory = {}, layer.ahn.fn
        for name, gate in left.gates.items():
            closed = torch.zeros_like(gate, dtype=torch.bool)
            closed[:, [head * memory.write_heads // memory.heads for head in self.heads]] = True
            if self.kept_out is not None:
                closed &= self.kept_out.to(gate.device)[:, None].reshape(-1, 1, gate.shape[2], *[1] * (gate.dim() - 3))
            gates[name] = gate.masked_fill(closed, memory.closed_gates[name])
        return dataclasses.replace(left, gates=gates)

    def reading(self, passage: Passage) -> Tensor:
        if self.read or passage.layer.index not in self.layers:
            return passage.read
        read = passage.read.clone()
        read[:, self.heads] = 0
        return read

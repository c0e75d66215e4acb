"""What one layer keeps of a conversation: exact window, low-bit tier, memory.

One form for all: a cache holds a `LayerState` per layer, a decoding step (`ahn.ops.step`) changes its tensors in place,
and a file has its tensors by the names of `LayerState.tensors`.

Shapes: B rows, Hkv key/value heads, Hw heads that write, P head dim, T tokens of the window (sinks first), C tokens of
the tier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ahn import private

Tensors: TypeAlias = dict[str, Tensor]
Change: TypeAlias = Callable[[Tensor], Tensor]

# Names in files. A memory's own tensors come as `state.…`, the tier's as `state.quantized.…`.
_GATES, _MEMORY, _TIER = "gates.", "state.", "state.quantized."


@dataclasses.dataclass
class WindowState:
    """The tokens that are held exactly: sinks and window.

    Attributes:
        keys, values: (B, Hkv, T, P) after RoPE, in one of two orders. Columns: as `Visibility` says. Slots: T = S + W,
            as `ahn.layout.slots.Slots` says.
        gates: the write gates of the same tokens, each (B, Hw, T, ...), in the keys' precision: their logits have no
            more.
        in_slots: whether the tokens lie in slots.
    """

    keys: Tensor
    values: Tensor
    gates: Tensors = dataclasses.field(default_factory=dict)
    in_slots: bool = False

    def map(self, change: Change) -> WindowState:
        """Each tensor changed in the same way."""
        return WindowState(change(self.keys), change(self.values), _mapped(self.gates, change), self.in_slots)


@dataclasses.dataclass
class TierRing:
    """The keys or the values of the tier: the token at position p of its row lies in slot (p - S) mod C.

    Attributes:
        codes: (B, Hkv, C, P · bits / 8) uint8 and
        scales: (B, Hkv, C) bfloat16, as `ahn.ops.quantize.encode` gives them; of keys after RoPE, or before it, as
            `AHNConfig.keys_before_rope` says.
        offset: (B, Hkv, P) float32, the mean of the row's first window, which was taken away before encoding; zero
            until the row's first token leaves the window.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor

    @property
    def bits(self) -> int:
        """Per number."""
        return 8 * self.codes.shape[-1] // self.offset.shape[-1]

    def map(self, change: Change) -> TierRing:
        """Each tensor changed in the same way."""
        return TierRing(change(self.codes), change(self.scales), change(self.offset))

    def over_tokens(self, change: Callable[..., Tensor], *others: TierRing) -> TierRing:
        """Codes and scales changed, each together with those of `others`; the offset stays."""
        codes, scales = ([getattr(ring, name) for ring in others] for name in ("codes", "scales"))
        return TierRing(change(self.codes, *codes), change(self.scales, *scales), self.offset)


@dataclasses.dataclass
class TierState:
    """The tokens of the low-bit tier.

    Attributes:
        gates: the write gates of the same tokens, (B, Hw, C, ...) each.
    """

    keys: TierRing
    values: TierRing
    gates: Tensors = dataclasses.field(default_factory=dict)

    def map(self, change: Change) -> TierState:
        """Each tensor changed in the same way."""
        return TierState(self.keys.map(change), self.values.map(change), _mapped(self.gates, change))

    def over_tokens(self, change: Callable[..., Tensor], *others: TierState) -> TierState:
        """Everything that is there per token changed, each tensor together with those of `others`."""
        keys = self.keys.over_tokens(change, *(tier.keys for tier in others))
        values = self.values.over_tokens(change, *(tier.values for tier in others))
        gates = {name: change(x, *(tier.gates[name] for tier in others)) for name, x in self.gates.items()}
        return TierState(keys, values, gates)

    def tensors(self) -> Tensors:
        """All tensors by name."""
        named = {"keys": self.keys.codes, "key_scales": self.keys.scales, "key_offset": self.keys.offset}
        named |= {"values": self.values.codes, "value_scales": self.values.scales, "value_offset": self.values.offset}
        return named | _prefixed(self.gates, _GATES)

    @classmethod
    def from_tensors(cls, named: Tensors) -> TierState:
        """The inverse of `tensors`."""
        keys = TierRing(named["keys"], named["key_scales"], named["key_offset"])
        values = TierRing(named["values"], named["value_scales"], named["value_offset"])
        return cls(keys, values, _under(named, _GATES))


@dataclasses.dataclass
class LayerState:
    """All that a layer keeps.

    Attributes:
        tier: None where there is none, or while nothing has left the window.
        memory: the memory's own tensors by name, after everything that was written; empty before the first write.
        sinks: (B, Hkv, S, P) keys of the sinks at their own positions, once the window has them at others.
        beside: places for G tokens that were read after those in the window's slots, each tensor (B, H, G, ...) in
            order; `Progress.beside` says how many are taken. Only where the window lies in slots.
    """

    window: WindowState
    tier: TierState | None = None
    memory: Tensors = dataclasses.field(default_factory=dict)
    sinks: Tensor | None = None
    beside: WindowState | None = None

    def map(self, change: Change) -> LayerState:
        """Each tensor changed in the same way."""
        tier = None if self.tier is None else self.tier.map(change)
        sinks = None if self.sinks is None else change(self.sinks)
        beside = None if self.beside is None else self.beside.map(change)
        return LayerState(self.window.map(change), tier, _mapped(self.memory, change), sinks, beside)

    def like(self, keys: Tensor, values: Tensor) -> LayerState:
        """With exact tokens in the dtypes of new ones, whose keys and values may differ under autocast."""

        def change(x: Tensor) -> Tensor:
            return x.to(keys.dtype)

        window, beside = (
            None if x is None else dataclasses.replace(x.map(change), values=x.values.to(values.dtype))
            for x in (self.window, self.beside)
        )
        assert window is not None
        tier = None if self.tier is None else dataclasses.replace(self.tier, gates=_mapped(self.tier.gates, change))
        return LayerState(window, tier, self.memory, None if self.sinks is None else change(self.sinks), beside)

    def tensors(self) -> Tensors:
        """All tensors by the names that they have in a file, the sinks at their own positions."""
        keys = self.window.keys
        if self.sinks is not None:
            keys = torch.cat([self.sinks, keys[:, :, self.sinks.shape[2] :]], dim=2)
        named = {"keys": keys, "values": self.window.values} | _prefixed(self.window.gates, _GATES)
        named |= _prefixed(self.memory, _MEMORY)
        return named if self.tier is None else named | _prefixed(self.tier.tensors(), _TIER)

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of `tensors`, by what they hold: `exact` tokens, `quantized` ones, and the `memory`."""
        tier = {} if self.tier is None else self.tier.tensors()
        parts = {"exact": self.tensors(), "quantized": tier, "memory": self.memory}
        sizes = {part: sum(x.nbytes for x in named.values()) for part, named in parts.items()}
        sizes["exact"] -= sizes["quantized"] + sizes["memory"]
        return sizes

    @classmethod
    def from_tensors(cls, named: Tensors) -> LayerState:
        """The inverse of `tensors`, for tokens that lie in columns."""
        tier = _under(named, _TIER)
        memory = _under({name: x for name, x in named.items() if not name.startswith(_TIER)}, _MEMORY)
        window = WindowState(named["keys"], named["values"], _under(named, _GATES))
        return cls(window, TierState.from_tensors(tier) if tier else None, memory)


def give_scores(states: Mapping[int, LayerState], layer: int | None) -> None:
    """Put the write gates of one layer's window beside the windows of all, which hold the same tokens.

    Args:
        states: by layer, after a forward.
        layer: `AHNConfig.score_layer`.
    """
    if layer is None or len(states) == 1:
        return
    gates = states[layer].window.gates
    windows = [state.window for at, state in states.items() if at != layer]
    for name, gate in gates.items():
        if states[layer].window.in_slots:  # a captured step knows these very tensors
            own = [window.gates[name] for window in windows]
            private.copy_all(own, [gate.to(x.device) for x in own])
        else:
            for window in windows:
                window.gates[name] = gate.to(window.gates[name].device, copy=True)


def _mapped(named: Tensors, change: Change) -> Tensors:
    return {name: change(x) for name, x in named.items()}


def _prefixed(named: Tensors, prefix: str) -> Tensors:
    return {prefix + name: x for name, x in named.items()}


def _under(named: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin so, without it."""
    return {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}

"""`record`: look on while a model reads and writes text, and keep numbers of what its memories do."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.cache.conversation import AHNCache
from ahn.errors import AHNError
from ahn.inspect.contribution import contribution
from ahn.inspect.memories import recurrent_layers, written_positions
from ahn.inspect.trace import Reads, Trace, Writes
from ahn.inspect.updates import updates
from ahn.layout.visibility import Visibility
from ahn.memory import RecurrentMemory
from ahn.model.attached import observed
from ahn.model.observer import Observer, Passage
from ahn.wrappers import attention_of


@contextlib.contextmanager
def record(model: PreTrainedModel) -> Iterator[Trace]:
    """Inside the block what the model's memories write and read is recorded; the outputs do not change.

    One conversation a trace: a forward without cache, or forwards and `generate` that go on with one cache. The trace
    holds 6 float32 numbers per head, layer and evicted token, on the CPU, and 3 per layer more; the work is done in
    pieces, so that nothing else grows with the text. Rows are those of the batch at the time (beam search moves them).

    While a recording is open, steps on a GPU take the ordinary path instead of captured graphs: equal to rounding.

    Raises:
        AHNError: the model has no recurrent memory, its memory states no `step_rule`, its `o_proj` is no plain
            matrix (quantised weights), or it trains with gradient checkpointing. In the block: a forward that does
            not go on where the last one ended.
    """
    memories = recurrent_layers(model)
    if model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise AHNError("Gradient checkpointing runs every layer twice; call model.eval() to record.")
    for index, memory in memories.items():
        if memory.step_rule() is None:
            raise AHNError(f"{memory.name} states no step_rule, so what it adds to its state is not known here.")
        weight = attention_of(model, index).o_proj.weight
        plain = isinstance(weight, Tensor) and type(weight.data) is Tensor
        if (
            not plain
            or weight.dim() != 2
            or weight.shape[1] != memory.heads * memory.head_dim
            or not weight.is_floating_point()
        ):
            raise AHNError("The model's o_proj is no plain matrix; load it without quantisation to look into it.")
    trace = Trace()
    with observed(model, _Recorder(trace), first=False):
        yield trace


class _Recorder(Observer):
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.cache: weakref.ref[AHNCache] | None = None
        self.total: int | None = None
        """Columns read after the last forward."""
        self.positions = self.queries = torch.empty(0)
        """(B or 1, m) of the forward under way: written tokens, reading queries; -1 for none."""

    def begin(self, cache: AHNCache | None, view: Visibility) -> None:
        same = (None if self.cache is None else self.cache()) is cache
        if self.total is not None and not (same and view.seen == self.total):
            raise AHNError(
                "A trace holds one conversation, and this forward does not go on where the last one ended "
                f"({self.total} tokens); open a new ahn.inspect.record(model) for it."
            )
        self.cache = None if cache is None else weakref.ref(cache)
        self.total = view.total
        view = view.delayed
        self.trace.window, self.trace.sinks = view.window, view.sinks
        queries = view.query_positions[:, view.length - view.evicted :]
        self.positions = written_positions(view).cpu()
        self.queries = queries.masked_fill(queries < view.lengths_before[:, None], -1).cpu()

    @torch.no_grad()
    def reading(self, passage: Passage) -> Tensor:
        layer, left = passage.layer, passage.left
        memory = layer.ahn.fn
        assert isinstance(memory, RecurrentMemory)
        rule = memory.step_rule()
        assert rule is not None
        with torch.autocast(passage.read.device.type, enabled=False):
            write = left.gates[rule.write].detach().float()
            decay = None if rule.decay is None else left.gates[rule.decay].detach().float()
            before = passage.before["state"]
            size, norm = updates(left.key, left.value, write, decay, before, rule, memory.routes)
            given = contribution(passage.module.o_proj.weight, passage.exact, passage.read)
        fade = torch.ones_like(write) if decay is None else decay.exp()
        batch = len(write)
        written = (x.repeat_interleave(memory.heads // memory.write_heads, 1) for x in (write, fade, size, norm))
        writes = Writes(self.positions.expand(batch, -1), *(x.cpu() for x in written))
        reads = Reads(**{n: x.cpu() for n, x in vars(given).items()}, positions=self.queries.expand(batch, -1))
        self.trace.add(layer.index, writes, reads)
        return passage.read

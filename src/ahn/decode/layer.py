"""One layer of one captured step: what the attention function does when a `StepForward` is under way."""

import dataclasses

import torch
from torch import Tensor, nn

from ahn.cache.layer_context import LayerContext
from ahn.memory import RecurrentMemory
from ahn.memory.query import memory_query
from ahn.memory.retained_tokens import RetainedTokens
from ahn.ops.gate import Gate
from ahn.ops.rule import StepRead
from ahn.ops.step.operator import layer_step
from ahn.ops.step.several import layer_read
from ahn.ops.step.turn import TierTurn


@dataclasses.dataclass
class StepForward:
    """Stands where a `ForwardContext` does in an ordinary forward.

    Attributes:
        positions: (B,) tokens that each row has read before.
        active: (B,) bool, rows whose new token is real.
        sinks: of the cache.
        seen: W + C, tokens that a query sees besides the sinks: what is older is in the memory.
        turn: of the tier's keys, where they are kept as before RoPE.
    """

    positions: Tensor
    active: Tensor
    sinks: int
    seen: int
    turn: TierTurn | None = None


@dataclasses.dataclass
class SeveralForward:
    """The same for several tokens of one conversation, see `ahn.ops.step.several`.

    Attributes:
        start, held: (1,) tokens in the slots, and beside them before these are read.
        sinks: of the cache.
        seen: W.
    """

    start: Tensor
    held: Tensor
    sinks: int
    seen: int


def several_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: SeveralForward,
    layer: LayerContext,
    scaling: float,
) -> tuple[Tensor, None]:
    """Attention of one layer over fixed slots and what lies beside them, plus the memory's read.

    Args:
        query: (1, Hq, N, P); key, value: (1, Hkv, N, P).

    Returns:
        (1, N, Hq, P), and None for the weights that the kernel never writes down.
    """
    memory, x = layer.ahn.fn, layer.x
    gates: dict[str, Gate] = {}
    rule = read = None
    if isinstance(memory, RecurrentMemory):
        rule, gates, N = memory.step_rule(), memory.step_gates(x), x.shape[1]
        weight = None
        if layer.router is not None:
            places = step.start + step.held + torch.arange(N, device=x.device)
            weight = layer.router(((places - (step.seen + step.sinks) + 1) / step.seen)[None])
        own = query if memory.q_proj is None else memory_query(module, memory, x, layer.rope, N)
        read = StepRead(own, memory.read_gate(x), weight, memory.step_norm, memory.o_proj.weight, memory.routes)
    state = layer.ahn.step_state
    assert state is not None
    out = layer_read(query, key, value, gates, step.start, step.held, state, step.sinks, scaling, rule, read)
    return out, None


def step_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, step: StepForward, layer: LayerContext, scaling: float
) -> tuple[Tensor, None]:
    """Attention of one layer over fixed slots, plus the memory's read.

    Args:
        query: (B, Hq, 1, P); key, value: (B, Hkv, 1, P).

    Returns:
        (B, 1, Hq, P), and None for the weights that the kernel never writes down.
    """
    memory, x = layer.ahn.fn, layer.x
    gates: dict[str, Gate] = {}
    rule = read = None
    if isinstance(memory, RecurrentMemory):
        rule = memory.step_rule()
        gates = {name: gate.first() for name, gate in memory.step_gates(x).items()}
        weight = None
        if layer.router is not None:
            written = step.positions - (step.seen + step.sinks) + 1
            weight = layer.router((written / step.seen)[:, None])[:, :, 0]
        own = query if memory.q_proj is None else memory_query(module, memory, x, layer.rope, 1)
        gamma = memory.read_gate(x)[:, :, 0]
        read = StepRead(own[:, :, 0], gamma, weight, memory.step_norm, memory.o_proj.weight, memory.routes)
    elif isinstance(memory, RetainedTokens):
        gates = {name: Gate(score[:, :, 0]) for name, score in memory.write_gates(x).items()}
    state = layer.ahn.step_state
    assert state is not None
    new = [x[:, :, 0] for x in (query, key, value)]
    turn = step.turn if layer.rotates else None
    out = layer_step(
        new[0],
        new[1],
        new[2],
        gates,
        step.positions,
        step.active,
        state,
        step.sinks,
        scaling,
        rule,
        read,
        turn,
        layer.ahn.step_seen,
        layer.ahn.step_basis,
    )
    return out[:, None], None

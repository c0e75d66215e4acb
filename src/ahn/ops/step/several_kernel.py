"""`ahn.ops.step.several` in Triton: two kernels (`ahn.ops.step.several_read_kernel`) for up to 16 tokens, and more.

The queries of all new tokens and of all query heads that share a key head are rows of one product. Of more tokens, or
where keys and queries choose among states, the memory's part is the scan of many tokens, beside attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.layout.state import LayerState, WindowState
from ahn.ops import scan
from ahn.ops.backend import multiprocessors
from ahn.ops.gate import Gate
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step import dependent_launch
from ahn.ops.step.head_kernel import slot_of
from ahn.ops.step.reference import StepRotation, by_steps, gates_of
from ahn.ops.step.several_read_kernel import attend_and_write, join_and_keep

TILE_BYTES = 16384  # keys that a program looks at together
LINE_BYTES = 128
ROWS = 64  # queries of a program; twice as many would leave a multiprocessor no registers for a second program
MOST_PARTS = 128
COLUMNS = 32  # of a head that a program joins, and of a state
TOKENS = 16  # that a program gathers


@triton.jit
def _gather(
    query, gamma, weight, keys, values, write_ring, decay_ring, start, held,
    gone_key, gone_value, gone_write, gone_decay, queries, gammas, weights,
    slots, sinks, stride_kh, stride_kt, stride_vh, stride_vt, query_h, query_n, gamma_h, gamma_n,
    NEW: tl.constexpr, PLACES: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WRITERS: tl.constexpr,
    P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What the tokens beside the slots, and new ones, replace, and new queries, in order for the scan."""
    h, p = tl.program_id(0), tl.arange(0, P)
    j = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    count = tl.load(held)
    position = tl.load(start) + j
    slot = slot_of(position, sinks, slots - sinks)
    i = j - count
    new = (i >= 0) & (i < NEW) & (j < PLACES)
    leaves = (position >= slots) & (j < count + NEW) & (j < PLACES)
    to = (h * PLACES + j)[:, None] * P + p[None, :]
    if h < KEY_HEADS:
        at = slot[:, None] * stride_kt + h * stride_kh + p[None, :]
        gone = tl.load(keys + at, mask=leaves[:, None], other=0.0)
        tl.store(gone_key + to, gone, mask=(j < PLACES)[:, None])
        at = slot[:, None] * stride_vt + h * stride_vh + p[None, :]
        gone = tl.load(values + at, mask=leaves[:, None], other=0.0)
        tl.store(gone_value + to, gone, mask=(j < PLACES)[:, None])
    if h < WRITERS:
        gone = tl.load(write_ring + h * slots + slot, mask=leaves, other=0.0)
        tl.store(gone_write + h * PLACES + j, gone.to(tl.float32), mask=j < PLACES)
        if decay_ring is not None:
            gone = tl.load(decay_ring + h * slots + slot, mask=leaves, other=0.0)
            tl.store(gone_decay + h * PLACES + j, gone.to(tl.float32), mask=j < PLACES)
    if NEW > 0:
        own = h * query_h + i[:, None] * query_n + p[None, :]
        if h < HEADS:
            q = tl.load(query + own, mask=new[:, None], other=0.0)
            tl.store(queries + to, q, mask=(j < PLACES)[:, None])
            gate = tl.load(gamma + h * gamma_h + i * gamma_n, mask=new, other=0.0)
            tl.store(gammas + h * PLACES + j, gate.to(tl.float32), mask=j < PLACES)
            if weight is not None:
                share = tl.load(weight + h * NEW + i, mask=new, other=0.0)
                tl.store(weights + h * PLACES + j, share.to(tl.float32), mask=j < PLACES)


@triton.jit
def _keep(
    keys, values, write_ring, decay_ring, beside_keys, beside_values, beside_write, beside_decay, start, held,
    slots, sinks, stride_kh, stride_kt, stride_vh, stride_vt,
    PLACES: tl.constexpr, KEY_HEADS: tl.constexpr, WRITERS: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What lies beside the slots into them."""
    h, p = tl.program_id(0), tl.arange(0, P)
    j = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    some = j < tl.minimum(tl.load(held), PLACES)
    slot = slot_of(tl.load(start) + j, sinks, slots - sinks)
    if h < KEY_HEADS:
        own = (h * PLACES + j)[:, None] * P + p[None, :]
        k, v = tl.load(beside_keys + own, mask=some[:, None]), tl.load(beside_values + own, mask=some[:, None])
        tl.store(keys + slot[:, None] * stride_kt + h * stride_kh + p[None, :], k, mask=some[:, None])
        tl.store(values + slot[:, None] * stride_vt + h * stride_vh + p[None, :], v, mask=some[:, None])
    if h < WRITERS:
        if write_ring is not None:
            gate = tl.load(beside_write + h * PLACES + j, mask=some)
            tl.store(write_ring + h * slots + slot, gate, mask=some)
        if decay_ring is not None:
            gate = tl.load(beside_decay + h * PLACES + j, mask=some)
            tl.store(decay_ring + h * slots + slot, gate, mask=some)


def read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: dict[str, Gate],
    start: Tensor,
    held: Tensor,
    state: LayerState,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    finish: StepRead | None,
    rotation: StepRotation | None = None,
    processors: int | None = None,
) -> Tensor:
    """See `ahn.ops.step.several.read`; float32 tensors are multiplied in full precision.

    A rotation is for what is done `by_steps` alone: the scan of many tokens wants rotated queries.
    """
    window, beside = state.window, state.beside
    assert beside is not None
    _, heads, new, P = query.shape
    key_heads, slots = window.keys.shape[1:3]
    query, key, value = map(_with_whole_heads, (query, key, value))
    rings, own_gates = gates_of(window.gates, rule), gates_of(beside.gates, rule)
    in_kernel = rule is not None and finish is not None and by_steps(new, finish.routes is not None)
    reads = None
    if rule is not None and finish is not None and not in_kernel:
        assert rotation is None
        gone = _gathered(start, held, window, beside, sinks, rule, new, finish)
        own = dataclasses.replace(finish, query=gone.query, gamma=gone.gamma, weight=gone.weight)
        evicted = gone.key, gone.value, gone.write, gone.decay
        with _aside(query.device):
            reads, _ = scan.write_and_read(gone.query, *evicted, state.memory["state"], rule, own)
    launch = dependent_launch.options(query) if reads is None else {"PDL": False}
    groups = heads // key_heads
    rows = min(ROWS, max(16, triton.next_power_of_2(groups * new)))
    blocks = triton.cdiv(groups * new, rows)
    parts = _parts(key_heads, blocks, slots, processors or multiprocessors(query.device))
    block = min(64, max(16, TILE_BYTES // (P * window.keys.element_size())))
    per_part = triton.cdiv(triton.cdiv(slots, parts), block) * block
    columns = min(COLUMNS, P)
    partial = torch.empty(new * heads, parts + 1, P, dtype=torch.float32, device=query.device)
    score = torch.empty(new * heads, parts + 1, dtype=torch.float32, device=query.device)
    memory_query = raw = gamma = weight = norm = o_proj = None
    if in_kernel and finish is not None:
        raw = torch.empty(new, heads, P, dtype=torch.float32, device=query.device)
        memory_query, norm, o_proj = _with_whole_heads(finish.query), finish.norm, finish.o_proj
        # A token's gates lie together, as projections give them.
        gamma = finish.gamma.transpose(1, 2).contiguous()
        weight = None if finish.weight is None else finish.weight.transpose(1, 2).contiguous()
    cos, sin, query_norm, key_norm, query_eps, key_eps = None, None, None, None, 0.0, 0.0
    if rotation is not None:
        cos, sin = rotation.cos.contiguous(), rotation.sin.contiguous()
        query_norm, key_norm = rotation.query_norm, rotation.key_norm
        query_eps, key_eps = rotation.query_eps, rotation.key_eps
    state_programs = groups * (P // columns) if in_kernel else 0
    attend_and_write[parts + 1 + state_programs, key_heads, blocks](
        query, key, value, window.keys, window.values, beside.keys, beside.values, start, held, partial, score,
        memory_query, *rings, state.memory.get("state"), raw, query_norm, key_norm, cos, sin, query_eps, key_eps,
        slots, sinks, scaling, per_part, rule.l2_eps if rule else 0.0, rule.scale if rule else 0.0,
        *_steps(query, key, value, memory_query), *_strides(window),
        NEW=new, TAIL=max(16, triton.next_power_of_2(new)), PLACES=beside.keys.shape[2], PARTS=parts, HEADS=heads,
        GROUPS=groups, ROWS=rows, P=P, BLOCK=block, LINE=min(P, LINE_BYTES // window.keys.element_size()),
        COLUMNS=columns, STATE_PROGRAMS=state_programs, DELTA=bool(rule and rule.delta),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=3 if query.element_size() == 2 else 2, **launch,
    )  # fmt: skip
    if reads is not None and query.is_cuda:
        torch.cuda.current_stream().wait_stream(_stream(query.device))
    out = torch.empty(1, new, heads, P, dtype=query.dtype, device=query.device)
    write, decay = (None, None) if rule is None else (gates[rule.write], gates.get(rule.decay or ""))
    join_and_keep[new * heads, P // columns + 1](
        partial, score, raw, gamma, weight, norm, o_proj, reads, out,
        key, value, *_of_gate(write), *_of_gate(decay), key_norm, cos, sin, key_eps,
        beside.keys, beside.values, *own_gates, held, rule.norm_eps if rule else 0.0,
        *_steps(key, value, *(None if gate is None else gate.logits for gate in (write, decay)), reads),
        SPLITS=parts + 1, ALL_SPLITS=triton.next_power_of_2(parts + 1), PLACES=beside.keys.shape[2], HEADS=heads,
        KEY_HEADS=key_heads, WRITERS=0 if rings[0] is None else rings[0].shape[1], P=P, COLUMNS=columns,
        ALL=triton.next_power_of_2(heads * P), MEMORY=in_kernel, ROUTER=weight is not None,
        ACROSS=bool(rule and rule.across_heads), WRITE_ACTIVATION=write.activation if write else "none",
        DECAY_ACTIVATION=decay.activation if decay else "none", num_warps=4, **launch,
    )  # fmt: skip
    return out


def settle(
    start: Tensor, held: Tensor, state: LayerState, sinks: int, rule: StepRule | None, routes: Routes | None
) -> None:
    """See `ahn.ops.step.several.settle`."""
    window, beside = state.window, state.beside
    assert beside is not None
    if rule is not None:
        gone = _gathered(start, held, window, beside, sinks, rule)
        evicted = gone.key, gone.value, gone.write, gone.decay
        state.memory["state"].copy_(scan.write(*evicted, state.memory["state"], rule, routes))
    rings, own = gates_of(window.gates, rule), gates_of(beside.gates, rule)
    writers = 0 if rings[0] is None else rings[0].shape[1]
    places, key_heads = beside.keys.shape[2], beside.keys.shape[1]
    _keep[max(key_heads, writers), triton.cdiv(places, TOKENS)](
        window.keys, window.values, *rings, beside.keys, beside.values, *own, start, held,
        window.keys.shape[2], sinks, *_strides(window),
        PLACES=places, KEY_HEADS=key_heads, WRITERS=writers, P=window.keys.shape[3], TOKENS=TOKENS,
    )  # fmt: skip


class _Gathered(NamedTuple):
    """What the tokens beside the slots replace, and what reads it, for G tokens in order.

    Attributes:
        key, value: (1, Hkv, G, P); write, decay: (1, Hw, G) float32, closed where nothing is replaced.
        query: (1, Hq, G, P); gamma, weight: (1, Hq, G) float32; zero but for new tokens.
    """

    key: Tensor
    value: Tensor
    write: Tensor
    decay: Tensor | None
    query: Tensor
    gamma: Tensor
    weight: Tensor | None


def _gathered(
    start: Tensor,
    held: Tensor,
    window: WindowState,
    beside: WindowState,
    sinks: int,
    rule: StepRule,
    new: int = 0,
    finish: StepRead | None = None,
) -> _Gathered:
    """What the tokens beside the slots, and so many new ones, replace."""
    key_heads, places, P = beside.keys.shape[1:]
    rings = gates_of(window.gates, rule)
    query, gamma, weight = (None, None, None) if finish is None else (finish.query, finish.gamma, finish.weight)
    query, weight = None if query is None else _with_whole_heads(query), None if weight is None else weight.contiguous()
    heads = 0 if query is None else query.shape[1]
    writers = 0 if rings[0] is None else rings[0].shape[1]
    like, device = beside.keys, start.device

    def gates(count: int) -> Tensor:
        return torch.empty(1, count, places, dtype=torch.float32, device=device)

    gone = _Gathered(
        like.new_empty(1, key_heads, places, P), like.new_empty(1, key_heads, places, P),
        gates(writers), None if rings[1] is None else gates(writers),
        like.new_empty(1, heads, places, P), gates(heads), None if weight is None else gates(heads),
    )  # fmt: skip
    _gather[max(heads, key_heads, writers), triton.cdiv(places, TOKENS)](
        query, gamma, weight, window.keys, window.values, *rings, start, held,
        gone.key, gone.value, gone.write, gone.decay, gone.query, gone.gamma, gone.weight,
        window.keys.shape[2], sinks, *_strides(window), *_steps(query, gamma),
        NEW=new, PLACES=places, HEADS=heads, KEY_HEADS=key_heads, WRITERS=writers, P=P, TOKENS=TOKENS,
    )  # fmt: skip
    return gone


def _of_gate(gate: Gate | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if gate is None else (gate.logits, gate.shift, gate.log_rate)


def _with_whole_heads(x: Tensor) -> Tensor:
    """x (1, H, N, P) with the numbers of a head next to each other."""
    return x if x.stride(3) == 1 else x.contiguous()


def _steps(*given: Tensor | None) -> list[int]:
    """From head to head and from token to token of each tensor (1, H, N, ...)."""
    return [step for x in given for step in ((0, 0) if x is None else x.stride()[1:3])]


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """What is launched in the block begins now, beside what follows it; in a graph these become two branches."""
    if device.type != "cuda":
        yield
        return
    side = _stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One that nobody else is given: others take theirs from those of ordinary priority, which are few and shared."""
    return torch.cuda.Stream(device, priority=-1)


def _parts(key_heads: int, blocks: int, slots: int, processors: int) -> int:
    """Of the slots, a power of two, so that all multiprocessors are busy.

    A multiprocessor holds two programs. Of up to 16 tokens one has enough keys under way, and those of the memory find
    room beside them, so that all run at once. Of more tokens products count, and there are two.
    """
    wanted = max(1, (1 if blocks <= 2 else 2) * processors // (key_heads * blocks))
    return min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(slots, ROWS)), 1 << (wanted.bit_length() - 1))


def _strides(window: WindowState) -> tuple[int, ...]:
    """Of heads and tokens, of keys and of values."""
    return (*window.keys.stride()[1:3], *window.values.stride()[1:3])

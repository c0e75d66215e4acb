"""`ahn.ops.step.several` in Triton: what leaves is gathered, then attended, the memory's scan, and both joined.

A multiprocessor's programs share out the slots among them, as for a single query; the queries of all new tokens and of
all query heads that share a key head are rows of one product.
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

from ahn.layout.state import LayerState, Tensors, WindowState
from ahn.ops import scan
from ahn.ops.backend import multiprocessors
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step.head_kernel import slot_of
from ahn.ops.step.reference import gates_of

TILE_BYTES = 16384  # keys that a program looks at together
ROWS = 64  # queries of a program
MOST_PARTS = 128
COLUMNS = 32  # of a head that a program joins
TOKENS = 16  # that a program gathers


@triton.jit
def _gather(
    query, key, value, write, decay, gamma, weight, keys, values, write_ring, decay_ring,
    beside_keys, beside_values, beside_write, beside_decay, start, held,
    gone_key, gone_value, gone_write, gone_decay, queries, gammas, weights,
    slots, sinks, stride_kh, stride_kt, stride_vh, stride_vt,
    query_h, query_n, key_h, key_n, value_h, value_n, write_h, write_n, decay_h, decay_n, gamma_h, gamma_n,
    NEW: tl.constexpr, PLACES: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WRITERS: tl.constexpr,
    P: tl.constexpr, MEMORY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """New tokens to their places beside the slots; what these replace, and new queries, in order for the scan."""
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
        if MEMORY:
            at = slot[:, None] * stride_kt + h * stride_kh + p[None, :]
            gone = tl.load(keys + at, mask=leaves[:, None], other=0.0)
            tl.store(gone_key + to, gone, mask=(j < PLACES)[:, None])
            at = slot[:, None] * stride_vt + h * stride_vh + p[None, :]
            gone = tl.load(values + at, mask=leaves[:, None], other=0.0)
            tl.store(gone_value + to, gone, mask=(j < PLACES)[:, None])
        if NEW > 0:
            own = h * key_h + i[:, None] * key_n + p[None, :]
            tl.store(beside_keys + to, tl.load(key + own, mask=new[:, None]), mask=new[:, None])
            own = h * value_h + i[:, None] * value_n + p[None, :]
            tl.store(beside_values + to, tl.load(value + own, mask=new[:, None]), mask=new[:, None])
    if MEMORY:
        if h < WRITERS:
            gone = tl.load(write_ring + h * slots + slot, mask=leaves, other=0.0)
            tl.store(gone_write + h * PLACES + j, gone.to(tl.float32), mask=j < PLACES)
            if decay_ring is not None:
                gone = tl.load(decay_ring + h * slots + slot, mask=leaves, other=0.0)
                tl.store(gone_decay + h * PLACES + j, gone.to(tl.float32), mask=j < PLACES)
            if NEW > 0:
                tl.store(beside_write + h * PLACES + j, tl.load(write + h * write_h + i * write_n, mask=new), mask=new)
                if decay_ring is not None:
                    tl.store(
                        beside_decay + h * PLACES + j, tl.load(decay + h * decay_h + i * decay_n, mask=new), mask=new
                    )
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
def _attend(
    query, keys, values, beside_keys, beside_values, start, held, partial, score,
    slots, sinks, scaling, per_part, query_h, query_n, stride_kh, stride_kt, stride_vh, stride_vt,
    NEW: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some queries of one key head over a part of the slots, or, in the last part, over what lies beside them."""
    part, head = tl.program_id(0), tl.program_id(1)
    p, r = tl.arange(0, P), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    mine = r < GROUPS * NEW
    read, count = tl.load(start).to(tl.int32), tl.load(held).to(tl.int32)
    later = count + r % NEW
    row = head * GROUPS * NEW + r
    own = (row // NEW * query_h + row % NEW * query_n)[:, None] + p[None, :]
    q = tl.load(query + own, mask=mine[:, None], other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, P], tl.float32)
    if part < PARTS:
        begin = part * per_part
        end = tl.minimum(tl.minimum(begin + per_part, slots), read)
        keys += head * stride_kh
        values += head * stride_vh
        window = slots - sinks
        phase = read % window
        for first in range(begin, end, BLOCK):
            t = first + tl.arange(0, BLOCK)
            there = t < end
            k = tl.load(keys + t[:, None] * stride_kt + p[None, :], mask=there[:, None], other=0.0)
            v = tl.load(values + t[:, None] * stride_vt + p[None, :], mask=there[:, None], other=0.0)
            replaced = (t % window - phase + window) % window
            seen = there[None, :] & ((t < sinks)[None, :] | (replaced[None, :] > later[:, None]))
            highest, total, acc = _with_block(q, k, v, seen, scaling, highest, total, acc, PRECISION)
    else:
        for first in range(0, PLACES, BLOCK):
            j = first + tl.arange(0, BLOCK)
            there = j < tl.minimum(count + NEW, PLACES)
            at = (head * PLACES + j)[:, None] * P + p[None, :]
            k = tl.load(beside_keys + at, mask=there[:, None], other=0.0)
            v = tl.load(beside_values + at, mask=there[:, None], other=0.0)
            seen = there[None, :] & (j[None, :] <= later[:, None])
            highest, total, acc = _with_block(q, k, v, seen, scaling, highest, total, acc, PRECISION)
    to = row * (PARTS + 1) + part
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(partial + to[:, None] * P + p[None, :], acc / safe[:, None], mask=mine[:, None])
    tl.store(score + to, highest + tl.log(safe), mask=mine)


@triton.jit
def _with_block(q, k, v, seen, scaling, highest, total, acc, PRECISION: tl.constexpr):
    """The online softmax with some more keys."""
    s = tl.dot(q, k.trans(), input_precision=PRECISION) * scaling
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(highest, tl.max(s, 1))
    # Of a block with nothing in it, -inf - -inf would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp(highest - base)
    e = tl.exp(s - base[:, None])
    acc = acc * keep[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
    return new, total * keep + tl.sum(e, 1), acc


@triton.jit
def _join(
    partial, score, read, held, out, read_h, read_t,
    NEW: tl.constexpr, PARTS: tl.constexpr, ALL: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
    COLUMNS: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """Some columns of one query's output: the parts by their weights, and the memory's read."""
    row, n = tl.program_id(0), tl.arange(0, ALL)
    h, i = row // NEW, row % NEW
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scores = tl.load(score + row * (PARTS + 1) + n, mask=n <= PARTS, other=float("-inf"))
    at = (row * (PARTS + 1) + n)[:, None] * P + c[None, :]
    parts = tl.load(partial + at, mask=(n <= PARTS)[:, None], other=0.0)
    e = tl.exp(scores - tl.max(scores, 0))
    y = tl.sum(parts * e[:, None], 0) / tl.sum(e, 0)
    if MEMORY:
        y += tl.load(read + h * read_h + (tl.load(held) + i) * read_t + c).to(tl.float32)
    tl.store(out + (i * HEADS + h) * P + c, y)


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
    gates: Tensors,
    start: Tensor,
    held: Tensor,
    state: LayerState,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    finish: StepRead | None,
    processors: int | None = None,
) -> Tensor:
    """See `ahn.ops.step.several.read`; float32 tensors are multiplied in full precision."""
    window, beside = state.window, state.beside
    assert beside is not None
    _, heads, new, P = query.shape
    key_heads, slots = window.keys.shape[1:3]
    query = _with_whole_heads(query)
    gone = _gathered(start, held, window, beside, sinks, rule, (key, value, gates), finish)
    reads = None
    if rule is not None and finish is not None:
        own = dataclasses.replace(finish, query=gone.query, gamma=gone.gamma, weight=gone.weight)
        evicted = gone.key, gone.value, gone.write, gone.decay
        with _aside(query.device):
            reads, _ = scan.write_and_read(gone.query, *evicted, state.memory["state"], rule, own)
    rows = min(ROWS, max(16, triton.next_power_of_2(heads // key_heads * new)))
    blocks = triton.cdiv(heads // key_heads * new, rows)
    parts = _parts(key_heads, blocks, slots, processors or multiprocessors(query.device))
    stages = 3 if query.element_size() == 2 else 2
    block = min(64, max(16, TILE_BYTES // (P * window.keys.element_size())))
    per_part = triton.cdiv(triton.cdiv(slots, parts), block) * block
    partial = torch.empty(heads * new, parts + 1, P, dtype=torch.float32, device=query.device)
    score = torch.empty(heads * new, parts + 1, dtype=torch.float32, device=query.device)
    _attend[parts + 1, key_heads, blocks](
        query, window.keys, window.values, beside.keys, beside.values, start, held, partial, score,
        slots, sinks, scaling, per_part, *query.stride()[1:3], *_strides(window),
        NEW=new, PLACES=beside.keys.shape[2], PARTS=parts, GROUPS=heads // key_heads, ROWS=rows, P=P, BLOCK=block,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=stages,
    )  # fmt: skip
    if reads is not None and query.is_cuda:
        torch.cuda.current_stream().wait_stream(_stream(query.device))
    out = torch.empty(1, new, heads, P, dtype=query.dtype, device=query.device)
    columns = min(COLUMNS, P)
    _join[heads * new, P // columns](
        partial, score, reads, held, out, *((0, 0) if reads is None else reads.stride()[1:3]),
        NEW=new, PARTS=parts, ALL=triton.next_power_of_2(parts + 1), HEADS=heads, P=P, COLUMNS=columns,
        MEMORY=reads is not None, num_warps=4,
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
    rule: StepRule | None,
    new: tuple[Tensor, Tensor, Tensors] | None = None,
    finish: StepRead | None = None,
) -> _Gathered:
    """New tokens (keys, values, gates) are put beside the slots; without a rule nothing is gathered."""
    key_heads, places, P = beside.keys.shape[1:]
    rings, own = gates_of(window.gates, rule), gates_of(beside.gates, rule)
    key = value = write = decay = None
    if new is not None:
        key, value = map(_with_whole_heads, new[:2])
        write, decay = gates_of(new[2], rule)
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
        query, key, value, write, decay, gamma, weight, window.keys, window.values, *rings,
        beside.keys, beside.values, *own, start, held,
        gone.key, gone.value, gone.write, gone.decay, gone.query, gone.gamma, gone.weight,
        window.keys.shape[2], sinks, *_strides(window), *_steps(query, key, value, write, decay, gamma),
        NEW=0 if key is None else key.shape[2], PLACES=places, HEADS=heads, KEY_HEADS=key_heads, WRITERS=writers, P=P,
        MEMORY=rule is not None, TOKENS=TOKENS,
    )  # fmt: skip
    return gone


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

    Where one block of rows holds all queries, keys are read once, and a program for each multiprocessor has enough of
    them under way; the memory's scan then finds room beside it. Else products count, and there are two.
    """
    wanted = max(1, (1 if blocks == 1 else 2) * processors // (key_heads * blocks))
    return min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(slots, ROWS)), 1 << (wanted.bit_length() - 1))


def _strides(window: WindowState) -> tuple[int, ...]:
    """Of heads and tokens, of keys and of values."""
    return (*window.keys.stride()[1:3], *window.values.stride()[1:3])

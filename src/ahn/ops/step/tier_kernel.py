"""The part that the tier has in a step: two kernels before those of `ahn.ops.step.kernel`.

The first rotates queries and, of each key head, puts the token that leaves the window into the tier and decodes
the one that leaves the tier, which then lies where the state's programs look for it. The second attends to the ring, in
parts that the step's last kernel joins with those of the window. Codes are levels that were rotated: a rotated query
meets them as they are, scales go into scores and weights, and what comes of the values is rotated back once, after the
parts are joined.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.layout.state import TierState, WindowState
from ahn.ops.quantize import EDGES, LEVELS
from ahn.ops.rule import StepRule
from ahn.ops.step.dependent_launch import announce, wait
from ahn.ops.step.head_kernel import finished_head, rotate, slot_of
from ahn.ops.step.reference import gates_of

_INNER, _OUTER = tl.constexpr(LEVELS[2][2]), tl.constexpr(LEVELS[2][3])
_EDGE = tl.constexpr(EDGES[2][2])
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclasses.dataclass
class TierStep:
    """What the kernels of one step tell each other, all written in every step; C > 0 tokens of the tier in N parts.

    Attributes:
        query: (B, Hq, P) float32, rotated.
        key_offset: (B, Hkv, P) float32, rotated.
        key, value: (B, Hkv, P) of the token that leaves the ring, in the window's precision.
        write, decay: (B, Hw) its gates, where the memory has them.
        partial: (B, Hq, N, P) float32, rotated and without the values' offset.
        score: (B, Hq, N) float32.
    """

    query: Tensor
    key_offset: Tensor
    key: Tensor
    value: Tensor
    write: Tensor | None
    decay: Tensor | None
    partial: Tensor
    score: Tensor

    @classmethod
    def empty(cls, query: Tensor, window: WindowState, rule: StepRule | None, parts: int) -> TierStep:
        """For queries (B, Hq, P)."""
        B, heads, P = query.shape
        rows = (B, window.keys.shape[1], P)
        wide: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        write, decay = (None if x is None else x.new_empty(x.shape[:2]) for x in gates_of(window.gates, rule))
        return cls(
            query=torch.empty(B, heads, P, **wide),
            key_offset=torch.empty(rows, **wide),
            key=window.keys.new_empty(rows),
            value=window.values.new_empty(rows),
            write=write,
            decay=decay,
            partial=torch.empty(B, heads, parts, P, **wide),
            score=torch.empty(B, heads, parts, **wide),
        )


@triton.jit
def _level(code):
    return tl.where(code < 2, tl.where(code == 0, -_OUTER, -_INNER), tl.where(code == 2, _INNER, _OUTER))


@triton.jit
def _rotate_and_push(
    query, keys, values, write, decay, key_codes, value_codes, key_scales, value_scales, key_offset, value_offset,
    tier_write, tier_decay, rotated, rotated_offset, gone_key, gone_value, gone_write, gone_decay, positions, active,
    query_norm, cos, sin, query_eps, stride_turn, slots, sinks, capacity,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WRITERS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each key head: a program for each of its queries, one for the key that leaves, one for the value."""
    announce(PDL)
    part = tl.program_id(0)
    HKV: tl.constexpr = HEADS // GROUPS
    b, head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    first, at = b * HEADS + head * GROUPS, (b * HKV + head).to(tl.int64)
    position, real = tl.load(positions + b), tl.load(active + b) != 0
    slot, place = slot_of(position, sinks, slots - sinks), at * capacity + (position - slots) % capacity
    leaves, begins = real & (position >= slots), real & (position == slots)
    p = tl.arange(0, P)
    wait(PDL)
    if part < GROUPS:
        if cos is not None:
            cos += b * stride_turn
            sin += b * stride_turn
        q = finished_head(query + (first + part) * P, p < P, query_norm, query_eps, cos, sin, P)
        q = q.to(keys.dtype.element_ty).to(tl.float32)  # as it meets the window's keys
        tl.store(rotated + (first + part) * P + p, rotate(q, P))
    elif part == GROUPS:
        keys += b.to(tl.int64) * stride_kb + head * stride_kh
        _push(
            keys, stride_kt, slots, sinks, slot, begins, leaves, key_codes + place * (P // 4), key_scales + place,
            key_offset + at * P, gone_key + at * P, rotated_offset + at * P, P, BLOCK_N, True,
        )  # fmt: skip
        if leaves:
            g = tl.arange(0, ROWS)
            h, mine = (at * WRITERS + g).to(tl.int64), g < WRITERS
            waiting, new = h * capacity + (position - slots) % capacity, h * slots + slot
            if write is not None:
                _pass_on(write + new, tier_write + waiting, gone_write + h, mine)
            if decay is not None:
                _pass_on(decay + new, tier_decay + waiting, gone_decay + h, mine)
    else:
        values += b.to(tl.int64) * stride_vb + head * stride_vh
        _push(
            values, stride_vt, slots, sinks, slot, begins, leaves, value_codes + place * (P // 4), value_scales + place,
            value_offset + at * P, gone_value + at * P, None, P, BLOCK_N, False,
        )  # fmt: skip


@triton.jit
def _pass_on(new, waiting, gone, mine):
    """Gates: those that waited go, the new ones wait in their place."""
    old, own = tl.load(waiting, mask=mine, other=0.0), tl.load(new, mask=mine, other=0.0)
    tl.debug_barrier()  # all threads have read what some of them now write
    tl.store(gone, old, mask=mine)
    tl.store(waiting, own, mask=mine)


@triton.jit
def _push(
    window, stride, slots, sinks, slot, begins, leaves, codes, scale, offset, gone, rotated,
    P: tl.constexpr, BLOCK_N: tl.constexpr, UNBIASED: tl.constexpr,
):  # fmt: skip
    """The key or value that leaves the window into its codes, what these were to `gone`; pointers of one head.

    `scale` and `codes` are those of the token's place; `rotated` is where the rotated offset goes, or None.
    """
    p = tl.arange(0, P)
    mean = tl.load(offset + p)
    if begins:
        total = tl.zeros([P], tl.float32)
        for start in range(sinks, slots, BLOCK_N):
            t = start + tl.arange(0, BLOCK_N)
            x = tl.load(window + t[:, None] * stride + p[None, :], mask=t[:, None] < slots, other=0.0)
            total += tl.sum(x.to(tl.float32), 0)
        mean = total / (slots - sinks)
    if rotated is not None:
        tl.store(rotated + p, rotate(mean, P))
    if leaves:
        old = (tl.load(codes + p // 4).to(tl.int32) >> 2 * (p % 4)) & 3
        decoded = rotate(_level(old) * tl.load(scale).to(tl.float32), P) + mean
        y = rotate(tl.load(window + slot * stride + p).to(tl.float32) - mean, P)
        size = tl.sum(y * y)
        z = y / tl.maximum(tl.sqrt(size / P), _TINY)
        code = (z > -_EDGE).to(tl.int32) + (z > 0.0).to(tl.int32) + (z > _EDGE).to(tl.int32)
        level = _level(code)
        product = tl.sum(y * level)
        new = size / tl.maximum(product, _TINY) if UNBIASED else product / tl.sum(level * level)
        packed = tl.sum(tl.reshape(code, [P // 4, 4]) << (2 * tl.arange(0, 4))[None, :], 1)
        tl.debug_barrier()  # all threads have read what the others now write
        tl.store(gone + p, decoded)
        tl.store(codes + tl.arange(0, P // 4), packed.to(tl.uint8))
        tl.store(scale, new)
        tl.store(offset + p, mean)


@triton.jit
def _attend_codes(
    rotated, rotated_offset, keys, values, key_scales, value_scales, positions, partial, score,
    slots, capacity, scaling, per_split, window,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of the ring, codes in words of 16, for the query heads that share a key head; multiplied as the window."""
    announce(PDL)
    part = tl.program_id(0)
    HKV: tl.constexpr = HEADS // GROUPS
    b, head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    first, at = b * HEADS + head * GROUPS, (b * HKV + head).to(tl.int64)
    keys += at * capacity * (P // 16)
    values += at * capacity * (P // 16)
    key_scales += at * capacity
    value_scales += at * capacity
    p, g = tl.arange(0, P), tl.arange(0, ROWS)
    mine = (g < GROUPS)[:, None]
    begin = part * per_split
    # The ring fills from its first slot on.
    held = tl.load(positions + b) - slots + 1
    end = tl.minimum(tl.minimum(begin + per_split, capacity), tl.minimum(held, capacity).to(tl.int32))
    wait(PDL)
    query = tl.load(rotated + (first + g)[:, None] * P + p[None, :], mask=mine, other=0.0)
    shared = tl.sum(query * tl.load(rotated_offset + at * P + p)[None, :], 1) * scaling
    q = query.to(window.dtype.element_ty)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, P], tl.float32)
    for start in range(begin, end, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        inside = t < end
        # Too small for the loop's own prefetching: under way while codes become levels.
        key_scale = tl.load(key_scales + t, mask=inside, other=0.0).to(tl.float32)
        value_scale = tl.load(value_scales + t, mask=inside, other=0.0).to(tl.float32)
        k = _levels(keys, t, inside, P, BLOCK_N).to(q.dtype)
        s = tl.dot(q, k.trans(), input_precision=PRECISION) * (key_scale * scaling)[None, :]
        s = tl.where(inside[None, :], s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))  # finite: no block is empty
        keep = tl.exp(highest - new)
        e = tl.exp(s - new[:, None])
        v = _levels(values, t, inside, P, BLOCK_N).to(q.dtype)
        weight = (e * value_scale[None, :]).to(q.dtype)
        acc = acc * keep[:, None] + tl.dot(weight, v, input_precision=PRECISION)
        total = total * keep + tl.sum(e, 1)
        highest = new
    row = (first + g) * SPLITS + part
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(partial + row[:, None] * P + p[None, :], acc / safe[:, None], mask=mine)
    tl.store(score + row, highest + tl.log(safe) + shared, mask=g < GROUPS)


@triton.jit
def _levels(words, t, inside, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """The levels of tokens t (N,), (N, P) float32: as `_level`, in fewer instructions."""
    w = tl.arange(0, P // 16)
    packed = tl.load(words + t[:, None] * (P // 16) + w[None, :], mask=inside[:, None], other=0)
    # Of each code the upper bit is the sign; of the inner levels the two bits differ.
    size = tl.where((_spread(packed ^ (packed << 1)) & 2) != 0, _INNER, _OUTER)
    level = tl.where((_spread(packed) & 2) != 0, size, -size)
    return tl.reshape(level, [BLOCK_N, P])


@triton.jit
def _spread(words):
    """Each word shifted by 0, 2, … 30 bits, in new dimensions whose numbers one thread holds together."""
    x = tl.join(words, words >> 16)
    x = tl.join(x, x >> 8)
    x = tl.join(x, x >> 4)
    return tl.join(x, x >> 2)


def push_and_attend(
    query: Tensor,
    positions: Tensor,
    active: Tensor,
    window: WindowState,
    tier: TierState,
    rule: StepRule | None,
    parts: int,
    block: int,
    sinks: int,
    scaling: float,
    rotation: tuple[Any, ...],
    launch: dict[str, Any],
) -> TierStep:
    """Put what leaves the window into the tier and attend to the tier.

    Args:
        query: (B, Hq, P) as projected; positions, active, window, tier, sinks, scaling, rule: see `ahn.ops.step.step`.
        parts, block: of the ring: how many, and tokens that a program looks at together.
        rotation: the queries' norm, cos, sin, the norm's eps, and how far apart rows of cos are.
        launch: see `ahn.ops.step.dependent_launch.options`.
    """
    step = TierStep.empty(query, window, rule, parts)
    keys, values = tier.keys, tier.values
    B, heads, P = query.shape
    HKV, slots = window.keys.shape[1:3]
    groups, capacity = heads // HKV, keys.codes.shape[2]
    rows = max(16, triton.next_power_of_2(groups))
    write, decay = gates_of(window.gates, rule)
    writers = 0 if write is None else write.shape[1] // HKV
    _rotate_and_push[groups + 2, B * HKV](
        query, window.keys, window.values, write, decay, keys.codes, values.codes,
        keys.scales, values.scales, keys.offset, values.offset, *gates_of(tier.gates, rule),
        step.query, step.key_offset, step.key, step.value, step.write, step.decay, positions, active,
        *rotation, slots, sinks, capacity, *window.keys.stride()[:3], *window.values.stride()[:3],
        HEADS=heads, GROUPS=groups, WRITERS=writers, ROWS=rows, P=P, BLOCK_N=block, num_warps=8, **launch,
    )  # fmt: skip
    _attend_codes[parts, B * HKV](
        step.query, step.key_offset, keys.codes.view(torch.int32), values.codes.view(torch.int32),
        keys.scales, values.scales, positions, step.partial, step.score,
        slots, capacity, scaling, triton.cdiv(triton.cdiv(capacity, parts), block) * block, window.keys,
        SPLITS=parts, HEADS=heads, GROUPS=groups, ROWS=rows, P=P, BLOCK_N=block,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, **launch,
    )  # fmt: skip
    return step

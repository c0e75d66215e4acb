"""Attention of a step to the codes of the tier, in parts that the step's last kernel joins with those of the window.

Codes are levels that were rotated by a Hadamard matrix: a query that was rotated as well meets them as they are, scales
go into scores and weights, and what comes of the values is rotated back once, after the parts are joined. So it is with
keys as they leave the window, and with keys before RoPE that are seen at the farthest distance, to which the query is
turned. Keys that are seen at distances of their own are rotated back, a block of tokens in two products of half the
head's size, and each turned by its place in the block; the query is turned to the block's first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ahn.ops.step.codes_kernel import levels, placed
from ahn.ops.step.dependent_launch import announce, wait
from ahn.ops.step.head_kernel import hadamard


@triton.jit
def attend_codes(
    rotated, before, rotated_offset, offset, keys, values, key_scales, value_scales, positions, partial, score,
    near_angles, within, slots, capacity, near, angles, scaling, per_near, per_far, window,
    NEAR: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    P: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    PRECISION: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of the ring, for the query heads that share a key head; multiplied as the window.

    The first NEAR parts are of the newest tokens, by age, which are turned; the others of those that follow.
    """
    announce(PDL)
    part = tl.program_id(0)
    HKV: tl.constexpr = HEADS // GROUPS
    b, head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    first, at = b * HEADS + head * GROUPS, (b * HKV + head).to(tl.int64)
    keys += at * capacity * (P * 3 // 8 if KEY_BITS == 3 else P * KEY_BITS // 32)
    values += at * capacity * (P * 3 // 8 if VALUE_BITS == 3 else P * VALUE_BITS // 32)
    key_scales += at * capacity
    value_scales += at * capacity
    p, g = tl.arange(0, P), tl.arange(0, ROWS)
    mine = (g < GROUPS)[:, None]
    position = tl.load(positions + b)
    held = tl.minimum(position - slots + 1, capacity).to(tl.int32)
    newest = ((position - slots) % capacity).to(tl.int32)
    begin = near + (part - NEAR) * per_far
    end = tl.minimum(begin + per_far, held)
    wait(PDL)
    place = placed(p, KEY_BITS, KEY_BYTES)
    query = tl.load(rotated + (first + g)[:, None] * P + place[None, :], mask=mine, other=0.0)
    shared = tl.sum(query * tl.load(rotated_offset + at * P + place)[None, :], 1) * scaling
    q = query.to(window.dtype.element_ty)
    if NEAR == 0:
        highest, total, acc = _alike(
            q, keys, values, key_scales, value_scales, newest, capacity, begin, end, scaling,
            ROWS, P, BLOCK_N, KEY_BITS, VALUE_BITS, PRECISION, KEY_BYTES, VALUE_BYTES, False,
        )  # fmt: skip
    elif part >= NEAR:
        highest, total, acc = _alike(
            q, keys, values, key_scales, value_scales, newest, capacity, begin, end, scaling,
            ROWS, P, BLOCK_N, KEY_BITS, VALUE_BITS, PRECISION, KEY_BYTES, VALUE_BYTES, True,
        )  # fmt: skip
    else:
        begin = part * per_near
        end = tl.minimum(tl.minimum(begin + per_near, near), held)
        highest, total, acc = _near(
            before + first * P, offset + at * P, keys, values, key_scales, value_scales, near_angles, within,
            angles, newest, capacity, begin, end, scaling, window,
            GROUPS, ROWS, P, BLOCK_N, KEY_BITS, VALUE_BITS, PRECISION, KEY_BYTES, VALUE_BYTES,
        )  # fmt: skip
        shared = tl.zeros([ROWS], tl.float32)
    row = (first + g) * SPLITS + part
    safe = tl.where(total == 0.0, 1.0, total)
    place = placed(p, VALUE_BITS, VALUE_BYTES)
    tl.store(partial + row[:, None] * P + place[None, :], acc / safe[:, None], mask=mine)
    tl.store(score + row, highest + tl.log(safe) + shared, mask=g < GROUPS)


@triton.jit
def _alike(
    q, keys, values, key_scales, value_scales, newest, capacity, begin, end, scaling,
    ROWS: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    PRECISION: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, BY_AGE: tl.constexpr,
):  # fmt: skip
    """Tokens that the same query meets: those of these ages, or in these slots."""
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, P], tl.float32)
    for start in range(begin, end, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        inside = t < end
        if BY_AGE:
            t = _slots_of(t, newest, capacity)
        # Too small for the loop's own prefetching: under way while codes become levels.
        key_scale = tl.load(key_scales + t, mask=inside, other=0.0).to(tl.float32)
        value_scale = tl.load(value_scales + t, mask=inside, other=0.0).to(tl.float32)
        k = levels(keys, t, inside, P, 0, P, BLOCK_N, KEY_BITS, q.dtype, KEY_BYTES)
        s = tl.dot(q, k.trans(), input_precision=PRECISION) * (key_scale * scaling)[None, :]
        s = tl.where(inside[None, :], s, float("-inf"))
        highest, total, acc = _added(
            s, highest, total, acc, values, value_scale, t, inside, q.dtype, P, BLOCK_N, VALUE_BITS, PRECISION,
            VALUE_BYTES,
        )  # fmt: skip
    return highest, total, acc


@triton.jit
def _near(
    query, offset, keys, values, key_scales, value_scales, near_angles, within, angles, newest, capacity, begin, end,
    scaling, window,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, PRECISION: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
):  # fmt: skip
    """Tokens of these ages, each at its own distance from queries that come before RoPE; `begin` begins a block."""
    HALF: tl.constexpr = P // 2
    DTYPE: tl.constexpr = window.dtype.element_ty
    j, h, g = tl.arange(0, BLOCK_N), tl.arange(0, HALF), tl.arange(0, ROWS)
    mine = (g < GROUPS)[:, None]
    q_first = tl.load(query + g[:, None] * P + h[None, :], mask=mine, other=0.0)
    q_second = tl.load(query + g[:, None] * P + HALF + h[None, :], mask=mine, other=0.0)
    mean_first, mean_second = tl.load(offset + h)[None, :], tl.load(offset + HALF + h)[None, :]
    cos = tl.load(within + j[:, None] * HALF + h[None, :])
    sin = tl.load(within + (BLOCK_N + j[:, None]) * HALF + h[None, :])
    # Of [[A, A], [A, -A]], the Hadamard matrix of P.
    A = hadamard(placed(h, KEY_BITS, KEY_BYTES)[:, None], h[None, :]).to(DTYPE)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, P], tl.float32)
    for start in range(begin, end, BLOCK_N):
        inside = start + j < end
        t = _slots_of(start + j, newest, capacity)
        key_scale = tl.load(key_scales + t, mask=inside, other=0.0).to(tl.float32)
        value_scale = tl.load(value_scales + t, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(near_angles + (start // BLOCK_N) * HALF + h)[None, :]
        s = tl.load(near_angles + angles + (start // BLOCK_N) * HALF + h)[None, :]
        a = tl.dot(
            levels(keys, t, inside, P, 0, HALF, BLOCK_N, KEY_BITS, DTYPE, KEY_BYTES), A, input_precision=PRECISION
        )
        b = tl.dot(
            levels(keys, t, inside, P, HALF, HALF, BLOCK_N, KEY_BITS, DTYPE, KEY_BYTES), A, input_precision=PRECISION
        )
        size = (key_scale / tl.sqrt(P * 1.0))[:, None]
        first, second = (a + b) * size + mean_first, (a - b) * size + mean_second
        k_first, k_second = first * cos + second * sin, second * cos - first * sin
        near_first, near_second = q_first * c - q_second * s, q_second * c + q_first * s
        scores = tl.dot(near_first.to(DTYPE), k_first.to(DTYPE).trans(), input_precision=PRECISION)
        scores += tl.dot(near_second.to(DTYPE), k_second.to(DTYPE).trans(), input_precision=PRECISION)
        scores = tl.where(inside[None, :], scores * scaling, float("-inf"))
        highest, total, acc = _added(
            scores, highest, total, acc, values, value_scale, t, inside, DTYPE, P, BLOCK_N, VALUE_BITS, PRECISION,
            VALUE_BYTES,
        )  # fmt: skip
    return highest, total, acc


@triton.jit
def _added(
    s, highest, total, acc, values, value_scale, t, inside, DTYPE: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr, BY_BYTES: tl.constexpr,
):  # fmt: skip
    """The softmax over what came before and a block of scores (ROWS, BLOCK_N), at least one of which is finite."""
    new = tl.maximum(highest, tl.max(s, 1))
    keep = tl.exp(highest - new)
    e = tl.exp(s - new[:, None])
    v = levels(values, t, inside, P, 0, P, BLOCK_N, BITS, DTYPE, BY_BYTES)
    weight = (e * value_scale[None, :]).to(DTYPE)
    acc = acc * keep[:, None] + tl.dot(weight, v, input_precision=PRECISION)
    return new, total * keep + tl.sum(e, 1), acc


@triton.jit
def _slots_of(ages, newest, capacity):
    """Where tokens of these ages lie, 0 being in the slot `newest`."""
    t = newest - ages
    return tl.where(t < 0, t + capacity, t)

"""`ahn.ops.step.retained` in two kernels: one takes the token that leaves, the other attends to what is kept."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.layout.state import WindowState
from ahn.ops.step.dependent_launch import announce, wait
from ahn.ops.step.head_kernel import finished_head, slot_of, turned
from ahn.ops.step.retained import SeenTokens


@triton.jit
def _keep(
    keys, values, scores, gone_key, gone_value, gone_score, seen_keys, seen_values, block_keys, block_values,
    seen_scores, seen_positions, angles, places, own, positions, active, slots, sinks, capacity, kept, block,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    HKV: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of a key head: what leaves the window, or the tier (`gone_…`), into the block."""
    announce(PDL)
    at = tl.program_id(0).to(tl.int64)
    b, head = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    position, real = tl.load(positions + b), tl.load(active + b) != 0
    left = position - slots - capacity + 1
    place = (left + block - 1) % block
    p = tl.arange(0, P)
    mine = at if places is None else b.to(tl.int64) * own + tl.load(places + head)
    keeps = True if places is None else tl.load(places + head) >= 0
    wait(PDL)
    if real & keeps & (left > 0) & (left % block != 0):
        if gone_key is None:
            slot = slot_of(position, sinks, slots - sinks)
            key = keys + b.to(tl.int64) * stride_kb + head * stride_kh + slot * stride_kt
            value = values + b.to(tl.int64) * stride_vb + head * stride_vh + slot * stride_vt
            score = scores + at * slots + slot
        else:
            key, value, score = gone_key + at * P, gone_value + at * P, gone_score + at
        token, in_block = mine * (kept + block) + kept + place, (mine * block + place) * P
        if angles is None:
            k = tl.load(key + p)
            tl.store(seen_keys + token * P + p, k)
        else:
            angles += b * 4 * P
            k = finished_head(key, p < P, None, 0.0, angles, angles + P, P).to(key.dtype.element_ty)
            tl.store(seen_keys + token * P + p, turned(k.to(tl.float32), angles + 2 * P, angles + 3 * P, P))
        v = tl.load(value + p)
        tl.store(seen_values + token * P + p, v)
        tl.store(block_keys + in_block + p, k)
        tl.store(block_values + in_block + p, v)
        tl.store(seen_scores + token, tl.load(score).to(tl.float32))
        tl.store(seen_positions + token, (left - 1 + sinks).to(tl.int32))


@triton.jit
def _attend_kept(
    query, keys, values, places, own, positions, partial, score, query_norm, cos, sin, query_eps, stride_turn,
    slots, capacity, kept, block, room, scaling, per_split, first_part,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of the kept tokens, for the query heads that share a key head; as the window's."""
    announce(PDL)
    part = tl.program_id(0)
    HKV: tl.constexpr = HEADS // GROUPS
    b, head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    place = head if places is None else tl.load(places + head)
    first, at = b * HEADS + head * GROUPS, (b * own + place).to(tl.int64) * (kept + block)
    left = tl.maximum(tl.load(positions + b) - slots - capacity + 1, 0)
    filling = left % block
    begin = part * per_split
    end = tl.minimum(begin + per_split, (kept + filling).to(tl.int32))
    if place < 0:  # nothing is seen, which the last kernel has to be told
        end = begin
    p, g = tl.arange(0, P), tl.arange(0, ROWS)
    mine = (g < GROUPS)[:, None]
    if cos is not None:
        cos += b * stride_turn
        sin += b * stride_turn
    wait(PDL)
    q = finished_head(query + (first + g)[:, None] * P, mine, query_norm, query_eps, cos, sin, P)
    q = q.to(keys.dtype.element_ty)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, P], tl.float32)
    for start in range(begin, end, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        held = (t < end) & (t - kept >= filling - left)
        k = tl.load(keys + (at + t[:, None]) * P + p[None, :], mask=held[:, None], other=0.0)
        s = tl.dot(q, k.trans(), input_precision=PRECISION) * scaling
        s = tl.where(held[None, :], s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        # Of a block with nothing in it, -inf - -inf would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp(highest - base)
        e = tl.exp(s - base[:, None])
        v = tl.load(values + (at + t[:, None]) * P + p[None, :], mask=held[:, None], other=0.0)
        acc = acc * keep[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        total = total * keep + tl.sum(e, 1)
        highest = new
    row = (first + g) * SPLITS + first_part + part
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(partial + row[:, None] * P + p[None, :], acc / safe[:, None], mask=mine)
    weight = tl.where((room > 0) & (left > room), tl.log(tl.maximum(room, 1) / tl.maximum(left, 1).to(tl.float32)), 0.0)
    tl.store(score + row, highest + tl.log(safe) + weight, mask=g < GROUPS)


def keep_and_attend(
    query: Tensor,
    positions: Tensor,
    active: Tensor,
    window: WindowState,
    scores: Tensor,
    gone: tuple[Tensor | None, Tensor | None, Tensor | None],
    seen: SeenTokens,
    partial: Tensor,
    score: Tensor,
    parts: int,
    block: int,
    sinks: int,
    capacity: int,
    scaling: float,
    rotation: tuple[Any, ...],
    launch: dict[str, Any],
) -> None:
    """Take in what leaves, and attend to the kept tokens in the last of the parts.

    Args:
        query: (B, Hq, P) as projected; positions, active, window, sinks, scaling: see `ahn.ops.step.reference.step`.
        scores: (B, Hkv, T) of the window's tokens.
        gone: key, value and score of what leaves the tier, whose slots are `capacity`; or None.
        partial, score: (B, Hq, N, P) and (B, Hq, N), of which the last `parts` are written.
        block: tokens that a program looks at together.
        rotation: the queries' norm, cos, sin, the norm's eps, and how far apart rows of cos are.
        launch: see `ahn.ops.step.dependent_launch.options`.
    """
    B, heads, P = query.shape
    HKV, slots = window.keys.shape[1:3]
    kept, count = seen.kept, seen.keys.shape[2]
    _keep[(B * HKV,)](
        window.keys, window.values, scores, *gone, seen.keys, seen.values, seen.block_keys, seen.block_values,
        seen.scores, seen.positions, seen.angles, seen.places, seen.keys.shape[1], positions, active, slots, sinks,
        capacity, kept, count - kept,
        *window.keys.stride()[:3], *window.values.stride()[:3], HKV=HKV, P=P, num_warps=1, **launch,
    )  # fmt: skip
    _attend_kept[parts, B * HKV](
        query, seen.keys, seen.values, seen.places, seen.keys.shape[1], positions, partial, score, *rotation,
        slots, capacity, kept, count - kept, seen.room, scaling, triton.cdiv(triton.cdiv(count, parts), block) * block,
        partial.shape[2] - parts,
        SPLITS=partial.shape[2], HEADS=heads, GROUPS=heads // HKV,
        ROWS=max(16, triton.next_power_of_2(heads // HKV)), P=P, BLOCK_N=block,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, **launch,
    )  # fmt: skip

"""The part that the tier has in a step: two kernels before those of `ahn.ops.step.kernel`.

The first rotates queries and, of each key head, puts the token that leaves the window into the tier and decodes
the one that leaves the tier, which then lies where the state's programs look for it. The second attends to the ring, in
parts that the step's last kernel joins with those of the window (`ahn.ops.step.codes_attention`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.layout.state import TierRing, TierState, WindowState
from ahn.ops.rule import StepRule
from ahn.ops.step.codes_attention import attend_codes
from ahn.ops.step.codes_kernel import code_of, level_of, load_codes, pack_codes, store_codes
from ahn.ops.step.dependent_launch import announce, wait
from ahn.ops.step.head_kernel import finished_head, joined, rotate, slot_of, turned
from ahn.ops.step.reference import gates_of
from ahn.ops.step.turn import BLOCK, TierTurn

REGISTERS = 128  # of a thread where keys are turned: four programs a multiprocessor, for some of the angles in L1
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclasses.dataclass
class TierStep:
    """What the kernels of one step tell each other, all written in every step; C > 0 tokens of the tier in N parts.

    Attributes:
        query: (B, Hq, P) float32, rotated; with keys before RoPE, as it meets those that are farthest.
        turned: (B, Hq, P) float32, the query before RoPE, where keys are kept so.
        key_offset: (B, Hkv, P) float32, rotated.
        key, value: (B, Hkv, P) of the token that leaves the ring, in the window's precision.
        write, decay: (B, Hw) its gates, where the memory has them.
        partial: (B, Hq, N, P) float32, rotated and without the values' offset.
        score: (B, Hq, N) float32.
    """

    query: Tensor
    turned: Tensor | None
    key_offset: Tensor
    key: Tensor
    value: Tensor
    write: Tensor | None
    decay: Tensor | None
    partial: Tensor
    score: Tensor

    @classmethod
    def empty(cls, query: Tensor, window: WindowState, rule: StepRule | None, parts: int, turning: bool) -> TierStep:
        """For queries (B, Hq, P)."""
        B, heads, P = query.shape
        rows = (B, window.keys.shape[1], P)
        wide: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        write, decay = (None if x is None else x.new_empty(x.shape[:2]) for x in gates_of(window.gates, rule))
        return cls(
            query=torch.empty(B, heads, P, **wide),
            turned=torch.empty(B, heads, P, **wide) if turning else None,
            key_offset=torch.empty(rows, **wide),
            key=window.keys.new_empty(rows),
            value=window.values.new_empty(rows),
            write=write,
            decay=decay,
            partial=torch.empty(B, heads, parts, P, **wide),
            score=torch.empty(B, heads, parts, **wide),
        )


@triton.jit
def _rotate_and_push(
    query, keys, values, write, decay, key_codes, value_codes, key_scales, value_scales, key_offset, value_offset,
    tier_write, tier_decay, rotated, before, rotated_offset, gone_key, gone_value, gone_write, gone_decay,
    positions, active, query_norm, cos, sin, query_eps, stride_turn, token, within, farthest, first_angles,
    slots, sinks, capacity, near_stride, first_stride, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WRITERS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each key head: a program for each of its queries, one for the key that leaves, one for the value.

    `token`, `within`, `farthest` and `first_angles` are of `TierTurn`, or None; strides are from cosines to sines in
    the last two.
    """
    announce(PDL)
    part = tl.program_id(0)
    HKV: tl.constexpr = HEADS // GROUPS
    b, head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    first, at = b * HEADS + head * GROUPS, (b * HKV + head).to(tl.int64)
    position, real = tl.load(positions + b), tl.load(active + b) != 0
    slot, place = slot_of(position, sinks, slots - sinks), at * capacity + (position - slots) % capacity
    leaves, begins = real & (position >= slots), real & (position == slots)
    p = tl.arange(0, P)
    if token is not None:
        token += b * 6 * P
    if part < GROUPS:
        wait(PDL)
        if cos is not None:
            cos += b * stride_turn
            sin += b * stride_turn
        q = finished_head(query + (first + part) * P, p < P, query_norm, query_eps, cos, sin, P)
        q = q.to(keys.dtype.element_ty).to(tl.float32)  # as it meets the window's keys
        if token is not None:
            q = turned(q, token, token + P, P)
            tl.store(before + (first + part) * P + p, q)
            q = turned(q, farthest, farthest + near_stride, P)
        tl.store(rotated + (first + part) * P + p, rotate(q, P))
    elif part == GROUPS:
        keys += b.to(tl.int64) * stride_kb + head * stride_kh
        _push(
            keys, stride_kt, slots, sinks, slot, begins, leaves,
            key_codes + place * (P * KEY_BITS // 8), key_scales + place,
            key_offset + at * P, gone_key + at * P, rotated_offset + at * P, token, within, first_angles, first_stride,
            P, BLOCK_N, KEY_BITS, True, PDL,
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
            values, stride_vt, slots, sinks, slot, begins, leaves,
            value_codes + place * (P * VALUE_BITS // 8), value_scales + place,
            value_offset + at * P, gone_value + at * P, None, None, None, None, 0, P, BLOCK_N, VALUE_BITS, False, PDL,
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
    token, within, first_angles, first_stride,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, UNBIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The key or value that leaves the window into its codes, what these were to `gone`; pointers of one head.

    `scale` and `codes` are those of the token's place; `rotated` is where the rotated offset goes, or None. With
    angles, keys are turned to before RoPE, and what leaves the tier to its position. All that is read was written in
    the step before, which has ended: so this waits only before it writes.
    """
    p = tl.arange(0, P)
    mean = tl.load(offset + p)
    if begins:
        if token is None:
            total = tl.zeros([P], tl.float32)
            for start in range(sinks, slots, BLOCK_N):
                t = start + tl.arange(0, BLOCK_N)
                x = tl.load(window + t[:, None] * stride + p[None, :], mask=t[:, None] < slots, other=0.0)
                total += tl.sum(x.to(tl.float32), 0)
        else:
            total = _sum_before(
                window + sinks * stride, stride, slots - sinks, within, first_angles, first_stride, P, BLOCK_N
            )
        mean = total / (slots - sinks)
    # Where nothing leaves, this comes to nothing that is kept.
    old = load_codes(codes, P, BITS)
    decoded = rotate(level_of(old, BITS) * tl.load(scale).to(tl.float32), P) + mean
    if token is None:
        x = tl.load(window + slot * stride + p).to(tl.float32)
    else:
        decoded = turned(decoded, token + 4 * P, token + 5 * P, P)
        x = finished_head(window + slot * stride, p < P, None, 0.0, token + 2 * P, token + 3 * P, P)
    y = rotate(x - mean, P)
    size = tl.sum(y * y)
    z = y / tl.maximum(tl.sqrt(size / P), _TINY)
    code = code_of(z, BITS)
    level = level_of(code, BITS)
    product = tl.sum(y * level)
    new = size / tl.maximum(product, _TINY) if UNBIASED else product / tl.sum(level * level)
    packed = pack_codes(code, P, BITS)
    wait(PDL)
    tl.debug_barrier()  # all threads have read what the others now write
    if rotated is not None:
        tl.store(rotated + p, rotate(mean, P))
    if leaves:
        tl.store(gone + p, decoded)
        store_codes(codes, packed, P, BITS)
        tl.store(scale, new)
        tl.store(offset + p, mean)


@triton.jit
def _sum_before(
    window, stride, count, within, first_angles, first_stride, P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The sum (P,) of the keys of a row's first window, `count` from this pointer on, turned to before RoPE."""
    HALF: tl.constexpr = P // 2
    j, h = tl.arange(0, BLOCK_N), tl.arange(0, HALF)
    cos, sin = tl.load(within + j[:, None] * HALF + h), tl.load(within + (BLOCK_N + j[:, None]) * HALF + h)
    first, second = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for start in range(0, count, BLOCK_N):
        at, held = window + (start + j[:, None]) * stride + h, start + j[:, None] < count
        x, y = (
            tl.load(at, mask=held, other=0.0).to(tl.float32),
            tl.load(at + HALF, mask=held, other=0.0).to(tl.float32),
        )
        a, b = tl.sum(x * cos + y * sin, 0), tl.sum(y * cos - x * sin, 0)
        c = tl.load(first_angles + (start // BLOCK_N) * HALF + h)
        s = tl.load(first_angles + first_stride + (start // BLOCK_N) * HALF + h)
        first += a * c + b * s
        second += b * c - a * s
    return joined(first, second, P)


def push_and_attend(
    query: Tensor,
    positions: Tensor,
    active: Tensor,
    window: WindowState,
    tier: TierState,
    rule: StepRule | None,
    parts: int,
    sinks: int,
    scaling: float,
    rotation: tuple[Any, ...],
    turn: TierTurn | None,
    launch: dict[str, Any],
) -> TierStep:
    """Put what leaves the window into the tier and attend to the tier.

    Args:
        query: (B, Hq, P) as projected; positions, active, window, tier, sinks, scaling, rule: see `ahn.ops.step.step`.
        parts: of the ring, a power of two.
        rotation: the queries' norm, cos, sin, the norm's eps, and how far apart rows of cos are.
        launch: see `ahn.ops.step.dependent_launch.options`.
    """
    step = TierStep.empty(query, window, rule, parts, turn is not None)
    keys, values = tier.keys, tier.values
    B, heads, P = query.shape
    HKV, slots = window.keys.shape[1:3]
    groups, capacity = heads // HKV, keys.codes.shape[2]
    rows = max(16, triton.next_power_of_2(groups))
    write, decay = gates_of(window.gates, rule)
    writers = 0 if write is None else write.shape[1] // HKV
    angles: tuple[Any, ...] = (None, None, None, None)
    near, near_angles, first_angles = 0, 0, 0
    if turn is not None:
        near, near_angles, first_angles = turn.count, turn.near.stride(0), turn.first.stride(0)
        angles = turn.token, turn.within, turn.near[0, -1], turn.first
    _rotate_and_push[groups + 2, B * HKV](
        query, window.keys, window.values, write, decay, keys.codes, values.codes,
        keys.scales, values.scales, keys.offset, values.offset, *gates_of(tier.gates, rule),
        step.query, step.turned, step.key_offset, step.key, step.value, step.write, step.decay, positions, active,
        *rotation, *angles, slots, sinks, capacity, near_angles, first_angles,
        *window.keys.stride()[:3], *window.values.stride()[:3],
        HEADS=heads, GROUPS=groups, WRITERS=writers, ROWS=rows, P=P, BLOCK_N=BLOCK, KEY_BITS=keys.bits,
        VALUE_BITS=values.bits, num_warps=8, **launch,
    )  # fmt: skip
    by_bytes = query.is_cuda and torch.version.hip is None and query.dtype == torch.bfloat16
    capped = turn is not None and by_bytes and P <= 128
    near_parts, per_near, per_far = shared_out(parts, capacity, near)
    attend_codes[parts, B * HKV](
        step.query, step.turned, step.key_offset, keys.offset, in_words(keys), in_words(values),
        keys.scales, values.scales, positions, step.partial, step.score,
        None if turn is None else turn.near, None if turn is None else turn.within,
        slots, capacity, near, near_angles, scaling,
        per_near, per_far, window.keys,
        NEAR=near_parts, SPLITS=parts, HEADS=heads, GROUPS=groups, ROWS=rows, P=P, BLOCK_N=BLOCK,
        KEY_BITS=keys.bits, VALUE_BITS=values.bits,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", **({"maxnreg": REGISTERS} if capped else {}),
        KEY_BYTES=by_bytes and keys.bits != 3, VALUE_BYTES=by_bytes and values.bits != 3, num_warps=4, **launch,
    )  # fmt: skip
    return step


def in_words(ring: TierRing) -> Tensor:
    """Codes as `ahn.ops.step.codes_kernel.levels` takes them."""
    return ring.codes if ring.bits == 3 else ring.codes.view(torch.int32)


def shared_out(parts: int, capacity: int, near: int) -> tuple[int, int, int]:
    """How many of the parts of the ring are for near tokens, and tokens in a part of these and of the others.

    A near token takes about twice the instructions of another.
    """
    far = capacity - near
    near_parts = min(max(round(parts * 2 * near / (2 * near + far)), near > 0), parts - (far > 0))
    sizes = [
        triton.cdiv(triton.cdiv(n, max(m, 1)), BLOCK) * BLOCK
        for n, m in ((near, near_parts), (far, parts - near_parts))
    ]
    return near_parts, sizes[0], sizes[1]

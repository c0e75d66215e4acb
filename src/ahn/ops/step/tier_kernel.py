"""The part that the tier has in a step: two kernels before those of `ahn.ops.step.kernel`.

The first rotates queries and, of each key head, puts the token that leaves the window into the tier and decodes
the one that leaves the tier, which then lies where the state's programs look for it. The second attends to the ring, in
parts that the step's last kernel joins with those of the window (`ahn.ops.step.codes_attention`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.layout.state import TierRing, TierState, WindowState
from ahn.ops.basis import Basis
from ahn.ops.quantize import signs
from ahn.ops.rule import StepRule
from ahn.ops.step import calibrated
from ahn.ops.step.codes_attention import FAR_TOKENS, WARPS, attend_codes
from ahn.ops.step.codes_kernel import code_of, level_of, load_codes, pack_codes, store_codes
from ahn.ops.step.dependent_launch import announce, wait
from ahn.ops.step.head_kernel import finished_head, joined, rotate, slot_of, turned
from ahn.ops.step.reference import gates_of
from ahn.ops.step.turn import BLOCK, TierTurn

PROGRAMS = 2  # of the ring's parts on a multiprocessor: as many as it holds where keys are turned, so one round does
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class RingShare(NamedTuple):
    """Tokens of the ring by age, in so many parts of so many tokens each."""

    parts: int
    tokens: int


NO_SHARES = RingShare(0, 0), RingShare(0, 0)


@dataclasses.dataclass
class TierStep:
    """What the kernels of one step tell each other, all written in every step.

    Attributes:
        query: (B, Hq, P) float32, as it meets tokens that are farthest, rotated.
        farthest: (B, Hq, P) float32, the same not rotated.
        before: (B, Hq, P) float32, the query before RoPE, where keys are kept so.
        key, value: (B, Hkv, P) of the token that leaves the ring, in the window's precision.
        write, decay: (B, Hw) its gates, where the memory has them.
    """

    query: Tensor
    farthest: Tensor
    before: Tensor | None
    key: Tensor
    value: Tensor
    write: Tensor | None
    decay: Tensor | None

    @classmethod
    def empty(cls, query: Tensor, window: WindowState, rule: StepRule | None, turning: bool) -> TierStep:
        """For queries (B, Hq, P)."""
        B, heads, P = query.shape
        rows = (B, window.keys.shape[1], P)
        write, decay = (None if x is None else x.new_empty(x.shape[:2]) for x in gates_of(window.gates, rule))
        queries = [torch.empty(B, heads, P, dtype=torch.float32, device=query.device) for _ in range(2 + turning)]
        return cls(
            query=queries[0],
            farthest=queries[1],
            before=queries[2] if turning else None,
            key=window.keys.new_empty(rows),
            value=window.values.new_empty(rows),
            write=write,
            decay=decay,
        )


@triton.jit
def _rotate_and_push(
    query, keys, values, write, decay, key_codes, value_codes, key_scales, value_scales, key_offset, value_offset,
    tier_write, tier_decay, rotated, seen, before, key, gone_key, gone_value, gone_write, gone_decay,
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
    newest = tl.maximum(position.to(tl.int32) - slots, 0) % capacity  # where nothing leaves, a place that there is
    slot, place = slot_of(position.to(tl.int32), sinks, slots - sinks), at * capacity + newest
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
        tl.store(seen + (first + part) * P + p, q)
        tl.store(rotated + (first + part) * P + p, rotate(q, P))
    elif part == GROUPS:
        keys += b.to(tl.int64) * stride_kb + head * stride_kh
        _push(
            keys, stride_kt, slots, sinks, slot, begins, leaves,
            key_codes + place * (P * KEY_BITS // 8), key_scales + place,
            key_offset + at * P, gone_key + at * P, token, within, first_angles, first_stride,
            key if key is None else key + at * P, P, BLOCK_N, KEY_BITS, True, PDL,
        )  # fmt: skip
        if leaves:
            g = tl.arange(0, ROWS)
            h, mine = (at * WRITERS + g).to(tl.int64), g < WRITERS
            waiting, new = h * capacity + newest, h * slots + slot
            if write is not None:
                _pass_on(write + new, tier_write + waiting, gone_write + h, mine)
            if decay is not None:
                _pass_on(decay + new, tier_decay + waiting, gone_decay + h, mine)
    else:
        values += b.to(tl.int64) * stride_vb + head * stride_vh
        _push(
            values, stride_vt, slots, sinks, slot, begins, leaves,
            value_codes + place * (P * VALUE_BITS // 8), value_scales + place,
            value_offset + at * P, gone_value + at * P, None, None, None, 0, None,
            P, BLOCK_N, VALUE_BITS, False, PDL,
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
    window, stride, slots, sinks, slot, begins, leaves, codes, scale, offset, gone,
    token, within, first_angles, first_stride, plain,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, UNBIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The key or value that leaves the window into its codes, what these were to `gone`; pointers of one head.

    `scale` and `codes` are those of the token's place. With angles, keys are turned to before RoPE, and what leaves the
    tier to its position. With `plain` the key is written there, less its mean, and nothing is coded. All that is read
    was written in the step before, which has ended: so this waits only before it writes.
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
    if token is None:
        x = tl.load(window + slot * stride + p).to(tl.float32)
    else:
        x = finished_head(window + slot * stride, p < P, None, 0.0, token + 2 * P, token + 3 * P, P)
    if plain is None:
        old = load_codes(codes, P, BITS)
        decoded = rotate(level_of(old, BITS) * tl.load(scale).to(tl.float32), P) + mean
        if token is not None:
            decoded = turned(decoded, token + 4 * P, token + 5 * P, P)
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
    if plain is not None:
        tl.store(plain + p, x - mean)
        if leaves:
            tl.store(offset + p, mean)
    elif leaves:
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
    sinks: int,
    scaling: float,
    rotation: tuple[Any, ...],
    turn: TierTurn | None,
    launch: dict[str, Any],
    shares: tuple[RingShare, RingShare],
    first: int,
    partial: Tensor,
    score: Tensor,
    basis: Basis | None,
) -> TierStep:
    """Put what leaves the window into the tier and attend to the tier.

    Args:
        query: (B, Hq, P) as projected.
        positions, active, window, tier, sinks, scaling, rule: see `ahn.ops.step.reference.step`.
        rotation: the queries' norm, cos, sin, the norm's eps, and how far apart rows of cos are.
        launch: see `ahn.ops.step.dependent_launch.options`.
        shares: from `shared_out`.
        first: where the tier's parts begin in `partial` and `score`.
        partial: (B, Hq, N, P) float32, what comes of each part, and `score` (B, Hq, N) the logarithm of its weights.
        basis: of the keys, or None.
    """
    step = TierStep.empty(query, window, rule, turn is not None)
    keys, values = tier.keys, tier.values
    B, heads, P = query.shape
    key = None if basis is None else torch.empty(B, window.keys.shape[1], P, dtype=torch.float32, device=query.device)
    HKV, slots = window.keys.shape[1:3]
    groups, capacity = heads // HKV, keys.codes.shape[2]
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
        step.query, step.farthest, step.before, key, step.key, step.value, step.write, step.decay, positions, active,
        *rotation, *angles, slots, sinks, capacity, near_angles, first_angles,
        *window.keys.stride()[:3], *window.values.stride()[:3],
        HEADS=heads, GROUPS=groups, WRITERS=writers, ROWS=max(16, triton.next_power_of_2(groups)), P=P, BLOCK_N=BLOCK,
        KEY_BITS=keys.bits, VALUE_BITS=values.bits, num_warps=4, **launch,
    )  # fmt: skip
    if key is not None and basis is not None:
        own = step.farthest, step.before, step.key, partial[:, :, first:], score[:, :, first:]
        told = calibrated.KeyStep(key, *own)
        calibrated.push_and_attend(told, positions, active, tier, basis, turn, slots, scaling)
        return step
    by_bytes = query.is_cuda and torch.version.hip is None and query.dtype == torch.bfloat16
    matrix = signs(P, query.dtype, query.device)
    near_share, far_share = shares
    attend_codes[near_share.parts + far_share.parts, B * HKV](
        step.query, step.before, step.farthest, keys.offset, values.offset, in_words(keys), in_words(values),
        keys.scales, values.scales, positions, partial, score,
        None if turn is None else turn.near, None if turn is None else turn.within, matrix,
        slots, capacity, near, near_angles, scaling, near_share.tokens, far_share.tokens, window.keys,
        FIRST=first, PARTS=partial.shape[2], NEAR=near_share.parts, HEADS=heads, GROUPS=groups,
        ROWS=max(8, triton.next_power_of_2(groups)), P=P, A=WARPS, KEY_BITS=keys.bits, VALUE_BITS=values.bits,
        KEY_BYTES=by_bytes and keys.bits != 3, VALUE_BYTES=by_bytes and values.bits != 3,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=WARPS, **launch,
    )  # fmt: skip
    return step


def in_words(ring: TierRing) -> Tensor:
    """Codes as `ahn.ops.step.codes_kernel.load_words` takes them."""
    return ring.codes if ring.bits == 3 else ring.codes.view(torch.int32)


def shared_out(capacity: int, near: int, rows: int, processors: int) -> tuple[RingShare, RingShare]:
    """The ring's parts for B · Hkv rows: of near tokens, and of the others; half the programs each, if there are both.

    Longer parts are better than more: what a program does before and after its part takes as long as two blocks.
    """
    most = PROGRAMS * processors // rows // (2 if 0 < near < capacity else 1)
    return _share(near, BLOCK, most), _share(capacity - near, FAR_TOKENS.value * WARPS, most)


def _share(tokens: int, block: int, most: int) -> RingShare:
    """At most so many parts of whole blocks."""
    size = triton.cdiv(triton.cdiv(tokens, block), max(1, most)) * block
    return RingShare(triton.cdiv(tokens, max(1, size)), size)

"""`ahn.ops.step.reference.step` in two Triton kernels, tuned for Hopper, right wherever Triton runs.

The first reads: programs of one kind attend to a part of the slots each, so that a single query keeps every
multiprocessor busy; programs of the other kind write the token that leaves into a part of one head's state, and read
it. Neither touches what the other reads. The second combines the parts, finishes the memory's read and, now that
nobody needs the old token any more, puts the new one into its slot. Both take heads and gates as projections give them:
whoever needs a query, the key or a gate finishes it for itself, which costs less than a kernel that does it once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.layout.state import LayerState
from ahn.ops.backend import multiprocessors
from ahn.ops.basis import Basis
from ahn.ops.gate import Gate
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step import calibrated, dependent_launch, retained_kernel, tier_kernel
from ahn.ops.step.combine_kernel import combine_and_keep
from ahn.ops.step.dependent_launch import announce, prefetch, wait
from ahn.ops.step.head_kernel import finished_head, slot_of
from ahn.ops.step.reference import StepRotation, gates_of
from ahn.ops.step.retained import SeenTokens
from ahn.ops.step.routes_kernel import route
from ahn.ops.step.turn import TierTurn

TILE_BYTES = 16384  # keys that a program looks at together; several tiles must fit a multiprocessor of any GPU
STATE_COLUMNS = 32  # columns of a state that a program holds: a cache line of each of its rows
LINE_BYTES = 128
REGISTERS = 96  # of a thread where there are few rows: a multiprocessor holds five programs, so one round does
MOST_WITH_KEPT = 128  # parts of the window where as many are of kept tokens
PROGRAMS_A_PROCESSOR = 16  # attention programs for each multiprocessor: several rounds, so that none waits at the end


def schedule(rows: int, slots: int, block: int, processors: int) -> tuple[int, int]:
    """Parts of the slots, a power of two, so that rows = B · Hkv keep all multiprocessors busy; tiles under way.

    All parts are combined by one program, hence the bounds: 256 parts of two tiles are faster where there are few
    rows (3.21 against 3.30 ms per step of Qwen2.5-3B on an H100), and not measured for more of them.
    """
    most, stages = (256, 2) if rows <= 2 else (128, 3)
    wanted = max(1, PROGRAMS_A_PROCESSOR * processors // rows)
    return min(most, triton.next_power_of_2(triton.cdiv(slots, block)), 1 << (wanted.bit_length() - 1)), stages


@triton.jit
def _attend_and_write(
    query, key, value, keys, values, positions, active, partial, score,
    memory_query, write, decay, state, read, gone_key, gone_value, gone_write, gone_decay,
    routed_key, query_share, key_share, query_norm, key_norm, cos, sin, query_eps, key_eps, stride_turn,
    slots, sinks, capacity, scaling, per_split, l2_eps, scale,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, LINE: tl.constexpr, COLUMNS: tl.constexpr, MEMORY: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr, STATES: tl.constexpr, READERS: tl.constexpr, STATE_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    part = tl.program_id(0)
    HKV: tl.constexpr = HEADS // GROUPS
    b, head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    position = tl.load(positions + b)
    slot = slot_of(position, sinks, slots - sinks)
    keys += b.to(tl.int64) * stride_kb + head * stride_kh
    values += b.to(tl.int64) * stride_vb + head * stride_vh
    if cos is not None:
        cos += b * stride_turn
        sin += b * stride_turn
    first = b * HEADS + head * GROUPS
    if part >= STATE_PROGRAMS:  # those that write begin first, so that none of them is left for the end
        part -= STATE_PROGRAMS
        begin = part * per_split
        end = tl.minimum(tl.minimum(begin + per_split, slots), position.to(tl.int32))
        _prefetch_tile(keys, begin, end, stride_kt, P, BLOCK_N, LINE, PDL)
        _prefetch_tile(values, begin, end, stride_vt, P, BLOCK_N, LINE, PDL)
        wait(PDL)
        new = (b * HKV + head) * P
        _attend(
            query, key + new, value + new, keys, values, partial, score, first, part, begin, end, slot,
            query_norm, key_norm, cos, sin, query_eps, key_eps, scaling, stride_kt, stride_vt,
            SPLITS, GROUPS, ROWS, P, BLOCK_N, PRECISION,
        )  # fmt: skip
    elif MEMORY:
        s = ((b * HKV + head) * (STATE_PROGRAMS // (P // COLUMNS)) + part // (P // COLUMNS)).to(tl.int64)
        h = s // STATES  # that writes
        c = (part % (P // COLUMNS)) * COLUMNS
        prefetch(state + s * P * P + tl.arange(0, P) * P + c, PDL)
        leaves = (position >= slots + capacity) & (tl.load(active + b) != 0)
        wait(PDL)
        if gone_key is None:  # the memory gets what leaves the window
            gone = keys + slot * stride_kt
            if routed_key is not None:
                gone = routed_key + h * P
            _write_and_read(
                memory_query, gone, values + slot * stride_vt, write, decay, state, read, h, s, c, leaves, slot,
                query_share, key_share, query_norm, cos, sin, query_eps, slots, l2_eps, scale,
                STATES, READERS, P, COLUMNS, DELTA, DECAY,
            )  # fmt: skip
        else:
            new = (b * HKV + head) * P
            gone = gone_key + new
            if routed_key is not None:
                gone = routed_key + h * P
            _write_and_read(
                memory_query, gone, gone_value + new, gone_write, gone_decay, state, read, h, s, c, leaves, 0,
                query_share, key_share, query_norm, cos, sin, query_eps, 1, l2_eps, scale,
                STATES, READERS, P, COLUMNS, DELTA, DECAY,
            )  # fmt: skip


@triton.jit
def _prefetch_tile(
    x, begin, end, stride, P: tl.constexpr, BLOCK_N: tl.constexpr, LINE: tl.constexpr, PDL: tl.constexpr
):
    """Keys or values that come first; LINE numbers are a cache line, or a whole token where that is less.

    All programs' first tiles are more than the memory delivers before the wait is over, and a query must not have to
    queue behind the rest.
    """
    if begin < end:
        t = tl.minimum(begin + tl.arange(0, BLOCK_N), end - 1)
        prefetch(x + t[:, None] * stride + tl.arange(0, P // LINE)[None, :] * LINE, PDL)


@triton.jit
def _attend(
    query, key, value, keys, values, partial, score, first, part, begin, end, slot,
    query_norm, key_norm, cos, sin, query_eps, key_eps, scaling, stride_kt, stride_vt,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The slots from `begin` to `end`, for the query heads that share a key head."""
    p, g = tl.arange(0, P), tl.arange(0, ROWS)
    mine = (g < GROUPS)[:, None]
    q = finished_head(query + (first + g)[:, None] * P, mine, query_norm, query_eps, cos, sin, P)
    q = q.to(keys.dtype.element_ty)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, P], tl.float32)
    for start in range(begin, end, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        held = (t < end) & (t != slot)
        k = tl.load(keys + t[:, None] * stride_kt + p[None, :], mask=held[:, None], other=0.0)
        s = tl.dot(q, k.trans(), input_precision=PRECISION) * scaling
        s = tl.where(held[None, :], s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        # Of a block with nothing in it, -inf - -inf would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp(highest - base)
        e = tl.exp(s - base[:, None])
        v = tl.load(values + t[:, None] * stride_vt + p[None, :], mask=held[:, None], other=0.0)
        acc = acc * keep[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        total = total * keep + tl.sum(e, 1)
        highest = new
    if part == 0:  # the new token, which is not in its slot yet: every part has left that slot out
        k = finished_head(key, p < P, key_norm, key_eps, cos, sin, P).to(keys.dtype.element_ty)
        own = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
        new = tl.maximum(highest, own)
        keep, e = tl.exp(highest - new), tl.exp(own - new)
        acc = acc * keep[:, None] + e[:, None] * tl.load(value + p).to(tl.float32)[None, :]
        total = total * keep + e
        highest = new
    at = (first + g) * SPLITS + part
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(partial + at[:, None] * P + p[None, :], acc / safe[:, None], mask=mine)
    tl.store(score + at, highest + tl.log(safe), mask=g < GROUPS)


@triton.jit
def _write_and_read(
    query, key, value, write, decay, state, read, h, s, first_column, leaves, slot,
    query_share, key_share, query_norm, cos, sin, query_eps, slots, l2_eps, scale,
    STATES: tl.constexpr, READERS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr,
):  # fmt: skip
    """Some columns of the state s, of the head h: u, and so the update, is worked out for each column by itself.

    With shares, queries and key come as `ahn.ops.step.routes_kernel` has made them.
    """
    p, c = tl.arange(0, P), first_column + tl.arange(0, COLUMNS)
    tile = state + s * P * P + p[:, None] * P + c[None, :]
    S = tl.load(tile)
    SHARED: tl.constexpr = query_share is not None
    if not SHARED:
        q = finished_head(query + h * P, p < P, query_norm, query_eps, cos, sin, P)
    if leaves:
        k, v = tl.load(key + p).to(tl.float32), tl.load(value + c).to(tl.float32)
        strength = tl.load(write + h * slots + slot).to(tl.float32)
        if SHARED:
            strength *= tl.load(key_share + s)
        else:
            k = k * tl.rsqrt(tl.sum(k * k) + l2_eps)
        if DECAY:
            S *= tl.exp(tl.load(decay + h * slots + slot).to(tl.float32))
        if DELTA:
            v -= tl.sum(S * k[:, None], 0)
        S += k[:, None] * (strength * v)[None, :]
        tl.store(tile, S)
    if SHARED:
        for g in tl.static_range(READERS):
            part = (h * READERS + g) * STATES + s % STATES
            q = tl.load(query + (h * READERS + g) * P + p) * tl.load(query_share + part)
            tl.store(read + part * P + c, tl.sum(S * q[:, None], 0))
    else:
        q = q * (tl.rsqrt(tl.sum(q * q) + l2_eps) * scale)
        tl.store(read + s * P + c, tl.sum(S * q[:, None], 0))


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Gate | None,
    decay: Gate | None,
    positions: Tensor,
    active: Tensor,
    state: LayerState,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    read: StepRead | None,
    rotation: StepRotation | None = None,
    turn: TierTurn | None = None,
    seen: SeenTokens | None = None,
    basis: Basis | None = None,
    processors: int | None = None,
) -> Tensor:
    """See `ahn.ops.step.reference.step`; float32 tensors are multiplied in full precision."""
    window, tier = state.window, state.tier
    processors = processors or multiprocessors(query.device)
    write_ring, decay_ring = gates_of(window.gates, rule)
    B, HEADS, P = query.shape
    HKV, slots = window.keys.shape[1:3]
    groups = HEADS // HKV
    block = min(64, max(16, TILE_BYTES // (P * window.keys.element_size())))
    splits, stages = schedule(B * HKV, slots, block, processors)
    splits = splits if seen is None else min(splits, MOST_WITH_KEPT)
    capacity = 0
    per_split, parts = triton.cdiv(triton.cdiv(slots, splits), block) * block, splits * (1 if seen is None else 2)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    shares = tier_kernel.NO_SHARES
    if tier is not None:
        capacity = tier.keys.codes.shape[2]
        if basis is None:
            shares = tier_kernel.shared_out(capacity, 0 if turn is None else turn.count, B * HKV, processors)
    of_tier = sum(share.parts for share in shares) if basis is None else calibrated.parts_of(capacity)
    every = parts + of_tier
    partial = torch.empty(B, HEADS, every, P, dtype=torch.float32, device=query.device)
    score = torch.empty(B, HEADS, every, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    columns = min(STATE_COLUMNS, P)
    strides = (*window.keys.stride()[:3], *window.values.stride()[:3])
    memory = rule is not None and read is not None
    states, readers = 1, groups if rule is None and write is not None else 1  # a memory of tokens: per key head
    if read is not None and read.routes is not None:
        states, readers = read.routes.states, groups
    raw = torch.empty(B, HEADS * states, P, dtype=torch.float32, device=query.device)
    state_programs = groups // readers * states * (P // columns) if memory else 0
    launch = dependent_launch.options(query)
    # 256 parts and 64 programs for the state are more than the 528 that an H100 holds by fours. Larger tiles spill.
    capped = launch["PDL"] and stages == 2 and P <= 128 and query.element_size() == 2
    cos, sin, query_norm, key_norm, query_eps, key_eps, stride_turn = None, None, None, None, 0.0, 0.0, 0
    if rotation is not None:
        cos, sin, stride_turn = rotation.cos.contiguous(), rotation.sin.contiguous(), P * (len(rotation.cos) > 1)
        query_norm, key_norm = rotation.query_norm, rotation.key_norm
        query_eps, key_eps = rotation.query_eps, rotation.key_eps
    read_query, gamma, weight, norm, o_proj = query, None, None, None, None
    if read is not None:
        read_query, gamma = read.query.contiguous(), read.gamma.contiguous()
        weight, norm, o_proj = read.weight, read.norm, read.o_proj
    gone: tuple[Tensor | None, ...] = (None, None, None, None)
    if tier is not None:
        tier_step = tier_kernel.push_and_attend(
            query, positions, active, window, tier, rule, sinks, scaling,
            (query_norm, cos, sin, query_eps, stride_turn), turn, launch, shares, splits, partial, score, basis,
        )  # fmt: skip
        gone = (tier_step.key, tier_step.value, tier_step.write, tier_step.decay)
    if seen is not None and write_ring is not None:
        retained_kernel.keep_and_attend(
            query, positions, active, window, write_ring, (gone[0], gone[1], gone[2]), seen, partial, score, splits,
            block, sinks, capacity, scaling, (query_norm, cos, sin, query_eps, stride_turn), launch,
        )  # fmt: skip
    routed: tuple[Tensor | None, ...] = (None, None, None)
    if read is not None and rule is not None and read.routes is not None:
        found = route(
            read_query, window.keys, gone[0], positions, (query_norm, cos, sin, query_eps, stride_turn), read.routes,
            sinks, rule.l2_eps, rule.scale, launch,
        )  # fmt: skip
        read_query, routed = found.query, (found.key, found.query_share, found.key_share)
    _attend_and_write[splits + state_programs, B * HKV](
        query, key, value, window.keys, window.values, positions, active, partial, score,
        read_query, write_ring, decay_ring, state.memory.get("state"), raw, *gone, *routed,
        query_norm, key_norm, cos, sin, query_eps, key_eps, stride_turn,
        slots, sinks, capacity, scaling, per_split, rule.l2_eps if rule else 0.0, rule.scale if rule else 0.0, *strides,
        SPLITS=every, HEADS=HEADS, GROUPS=groups, ROWS=max(16, triton.next_power_of_2(groups)), P=P, BLOCK_N=block,
        LINE=min(P, LINE_BYTES // window.keys.element_size()), COLUMNS=columns, MEMORY=memory,
        DELTA=bool(rule and rule.delta), DECAY=bool(rule and rule.decay), STATES=states, READERS=readers,
        STATE_PROGRAMS=state_programs,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=stages,
        **launch, **({"maxnreg": REGISTERS} if capped else {}),
    )  # fmt: skip
    combine_and_keep[B * HEADS, P // columns + 1](
        partial, score, raw, gamma, weight, norm, o_proj, out,
        key, value, *_parts(write), *_parts(decay), key_norm, cos, sin, key_eps, stride_turn,
        window.keys, window.values, write_ring, decay_ring, positions, active,
        slots, sinks, rule.norm_eps if rule else 0.0, *strides,
        SPLITS=every, ALL_SPLITS=triton.next_power_of_2(every), HEADS=HEADS, GROUPS=groups, P=P, COLUMNS=columns,
        ALL=triton.next_power_of_2(HEADS * P), MEMORY=memory, STATES=states, READERS=readers,
        ROUTER=weight is not None, ACROSS=bool(rule and rule.across_heads),
        WRITE_ACTIVATION=write.activation if write else "none",
        DECAY_ACTIVATION=decay.activation if decay else "none", num_warps=4, **launch,
    )  # fmt: skip
    return out


def _parts(gate: Gate | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if gate is None else (gate.logits.contiguous(), gate.shift, gate.log_rate)

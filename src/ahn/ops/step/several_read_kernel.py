"""The two kernels of `ahn.ops.step.several.read`: what one token's step does (`ahn.ops.step.kernel`), for a few tokens.

The first attends: each program to a part of the slots, the last part to what lies beside them and to the new tokens.
Other programs of it take some columns of a state each, write what the tokens beside the slots replace, one token after
the other, and read for each new query; the state itself stays as it is. The second joins the parts, finishes the
memory's reads and puts the new tokens beside the slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ahn.ops.step.combine_kernel import joined
from ahn.ops.step.dependent_launch import announce, prefetch, wait
from ahn.ops.step.head_kernel import finished_gate, finished_head, slot_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_and_write(
    query, key, value, keys, values, beside_keys, beside_values, start, held, partial, score,
    memory_query, write_ring, decay_ring, state, raw, query_norm, key_norm, cos, sin, query_eps, key_eps,
    slots, sinks, scaling, per_part, l2_eps, scale,
    query_h, query_n, key_h, key_n, value_h, value_n, memory_h, memory_n, stride_kh, stride_kt, stride_vh, stride_vt,
    NEW: tl.constexpr, TAIL: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
    COLUMNS: tl.constexpr, STATE_PROGRAMS: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    part, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    read, count = tl.load(start).to(tl.int32), tl.load(held).to(tl.int32)
    keys += head * stride_kh
    values += head * stride_vh
    if part >= STATE_PROGRAMS:  # those that write begin first, for they have the longest way
        part -= STATE_PROGRAMS
        begin = part * per_part
        end = tl.minimum(tl.minimum(begin + per_part, slots), read)
        if part < PARTS and begin < end:
            t = tl.minimum(begin + tl.arange(0, 2 * BLOCK), end - 1)[:, None]
            line = tl.arange(0, P // LINE)[None, :] * LINE
            prefetch(keys + t * stride_kt + line, PDL)
            prefetch(values + t * stride_vt + line, PDL)
        wait(PDL)
        _attend(
            query, key + head * key_h, value + head * value_h, keys, values, beside_keys, beside_values, partial, score,
            query_norm, key_norm, cos, sin, query_eps, key_eps,
            part, head, block, read, count, begin, end, slots, sinks, scaling * LOG2_E,
            query_h, query_n, key_n, value_n, stride_kt, stride_vt,
            NEW, TAIL, PLACES, PARTS, HEADS, GROUPS, ROWS, P, BLOCK, PRECISION,
        )  # fmt: skip
    elif STATE_PROGRAMS > 0 and block == 0:
        h = head * GROUPS + part // (P // COLUMNS)
        _write_and_read(
            memory_query + h * memory_h, query_norm, cos, sin, query_eps, keys, values, write_ring, decay_ring, state,
            raw, h,
            part % (P // COLUMNS) * COLUMNS, read, count, slots, sinks, l2_eps, scale, memory_n, stride_kt, stride_vt,
            NEW, HEADS, P, COLUMNS, DELTA, PDL,
        )  # fmt: skip


@triton.jit
def _attend(
    query, key, value, keys, values, beside_keys, beside_values, partial, score,
    query_norm, key_norm, cos, sin, query_eps, key_eps,
    part, head, block, read, count, begin, end, slots, sinks, scaling,
    query_h, query_n, key_n, value_n, stride_kt, stride_vt,
    NEW: tl.constexpr, TAIL: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some queries of one key head over a part of the slots, or, in the last part, over what is not in them yet.

    `scaling` is for powers of two.
    """
    p, r = tl.arange(0, P), block * ROWS + tl.arange(0, ROWS)
    mine, i, h = r < GROUPS * NEW, r % NEW, head * GROUPS + r // NEW
    of_query = query + (h * query_h + i * query_n)[:, None]
    q = _finished(of_query, mine[:, None], query_norm, query_eps, cos, sin, i[:, None], P).to(keys.dtype.element_ty)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, P], tl.float32)
    if part < PARTS:
        window = slots - sinks
        first = sinks + tl.maximum(read - sinks, 0) % window  # the slot of the token after those that are in slots
        later = count + i
        for at in range(begin, end, BLOCK):
            t = at + tl.arange(0, BLOCK)
            there = t < end
            k = tl.load(keys + t[:, None] * stride_kt + p[None, :], mask=there[:, None], other=0.0)
            v = tl.load(values + t[:, None] * stride_vt + p[None, :], mask=there[:, None], other=0.0)
            # The token in a slot is replaced by the new one that comes so many after those in the slots.
            replaced = tl.where(t < first, t - first + window, t - first)
            replaced = tl.where(t < sinks, slots, replaced)
            seen = tl.where(there, replaced, -1)[None, :] > later[:, None]
            highest, total, acc = _with_block(q, k, v, seen, scaling, highest, total, acc, PRECISION)
    else:
        for at in range(0, count, BLOCK):
            j = at + tl.arange(0, BLOCK)
            there = j < count
            own = (head * PLACES + j)[:, None] * P + p[None, :]
            k = tl.load(beside_keys + own, mask=there[:, None], other=0.0)
            v = tl.load(beside_values + own, mask=there[:, None], other=0.0)
            highest, total, acc = _with_block(q, k, v, there[None, :], scaling, highest, total, acc, PRECISION)
        n = tl.arange(0, TAIL)
        of_key, token = key + n[:, None] * key_n, tl.minimum(n, NEW - 1)[:, None]
        k = _finished(of_key, (n < NEW)[:, None], key_norm, key_eps, cos, sin, token, P).to(q.dtype)
        v = tl.load(value + n[:, None] * value_n + p[None, :], mask=(n < NEW)[:, None], other=0.0).to(q.dtype)
        seen = n[None, :] <= i[:, None]
        highest, total, acc = _with_block(q, k, v, seen, scaling, highest, total, acc, PRECISION)
    to = (i * HEADS + h) * (PARTS + 1) + part
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(partial + to[:, None] * P + p[None, :], acc / safe[:, None], mask=mine[:, None])
    tl.store(score + to, (highest + tl.log2(safe)) / LOG2_E, mask=mine)


@triton.jit
def _finished(x, kept, norm, eps, cos, sin, token, P: tl.constexpr):
    """`finished_head` by the angles of these tokens."""
    if cos is not None:
        cos += token * P
        sin += token * P
    return finished_head(x, kept, norm, eps, cos, sin, P)


@triton.jit
def _with_block(q, k, v, seen, scaling, highest, total, acc, PRECISION: tl.constexpr):
    """The online softmax, in powers of two, with some more keys."""
    s = tl.dot(q, k.trans(), input_precision=PRECISION) * scaling
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(highest, tl.max(s, 1))
    # Of a block with nothing in it, -inf - -inf would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(highest - base)
    e = tl.exp2(s - base[:, None])
    acc = acc * keep[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
    return new, total * keep + tl.sum(e, 1), acc


@triton.jit
def _write_and_read(
    query, query_norm, cos, sin, query_eps, keys, values, write_ring, decay_ring, state, raw, h, first_column,
    read, count, slots, sinks, l2_eps, scale, query_n, stride_kt, stride_vt,
    NEW: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of the head h's state, which is written in registers alone.

    Slots and state are written by ordinary kernels of other graphs only, so that they are looked at before the wait.
    """
    p, c = tl.arange(0, P), first_column + tl.arange(0, COLUMNS)
    S = tl.load(state + h * P * P + p[:, None] * P + c[None, :])
    write_ring += h * slots
    if decay_ring is not None:
        decay_ring += h * slots
    values += first_column
    last = count + NEW
    first = tl.minimum(tl.maximum(slots - read, 0), count)  # nothing leaves before
    k, v, strength, fade = _leaving(
        keys, values, write_ring, decay_ring, first, last, read, slots, sinks, stride_kt, stride_vt, P, COLUMNS
    )
    for j in range(first, count):
        following = _leaving(  # under way while this one is written
            keys, values, write_ring, decay_ring, j + 1, last, read, slots, sinks, stride_kt, stride_vt, P, COLUMNS
        )
        S = _written(S, k, v, strength, fade, l2_eps, decay_ring is not None, DELTA)
        k, v, strength, fade = following
    wait(PDL)
    q = _finished(query, p < P, query_norm, query_eps, cos, sin, 0, P)
    for i in range(NEW):
        following = _leaving(
            keys, values, write_ring, decay_ring, count + i + 1, last, read, slots, sinks, stride_kt, stride_vt, P,
            COLUMNS,
        )  # fmt: skip
        token = tl.minimum(i + 1, NEW - 1)
        after = _finished(query + token * query_n, p < P, query_norm, query_eps, cos, sin, token, P)
        S = _written(S, k, v, strength, fade, l2_eps, decay_ring is not None, DELTA)
        unit = q * (tl.rsqrt(tl.sum(q * q) + l2_eps) * scale)
        tl.store(raw + (i * HEADS + h) * P + c, tl.sum(S * unit[:, None], 0))
        k, v, strength, fade = following
        q = after


@triton.jit
def _leaving(
    keys, values, write_ring, decay_ring, j, last, read, slots, sinks, stride_kt, stride_vt,
    P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Key, value and gates that the token at the place j beside the slots replaces; gates are closed if it does not."""
    position = read + j
    leaves = (position >= slots) & (j < last)
    slot = slot_of(position, sinks, slots - sinks)
    p, c, width = tl.arange(0, P), tl.arange(0, COLUMNS), tl.where(leaves, P, 0)
    k = tl.load(keys + slot * stride_kt + p, mask=p < width, other=0.0)
    v = tl.load(values + slot * stride_vt + c, mask=c < width, other=0.0)
    strength = tl.load(write_ring + slot, mask=leaves, other=0.0).to(tl.float32)
    fade = strength
    if decay_ring is not None:
        fade = tl.load(decay_ring + slot, mask=leaves, other=0.0).to(tl.float32)
    return k, v, strength, fade


@triton.jit
def _written(S, k, v, strength, fade, l2_eps, DECAY: tl.constexpr, DELTA: tl.constexpr):
    """The state after one more token; see `ahn.ops.rule.StepRule`."""
    k, u = k.to(tl.float32), v.to(tl.float32)
    k *= tl.rsqrt(tl.sum(k * k) + l2_eps)
    if DECAY:
        S *= tl.exp(fade)
    if DELTA:
        u -= tl.sum(S * k[:, None], 0)
    return S + k[:, None] * (strength * u)[None, :]


@triton.jit
def join_and_keep(
    partial, score, raw, gamma, weight, norm, o_proj, finished, out,
    key, value, write, write_shift, write_log_rate, decay, decay_shift, decay_log_rate, key_norm, cos, sin, key_eps,
    beside_keys, beside_values, beside_write, beside_decay, held, norm_eps,
    key_h, key_n, value_h, value_n, write_h, write_n, decay_h, decay_n, finished_h, finished_t,
    SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr, PLACES: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WRITERS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr, MEMORY: tl.constexpr,
    ROUTER: tl.constexpr, ACROSS: tl.constexpr, WRITE_ACTIVATION: tl.constexpr, DECAY_ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of one query's output; in one more program for each query, what is kept of its token."""
    announce(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    i, h = row // HEADS, row % HEADS
    if part < P // COLUMNS:
        y = joined(
            partial, score, raw, gamma, weight, norm, o_proj, norm_eps, row, i, h, part,
            SPLITS, ALL_SPLITS, HEADS, P, COLUMNS, ALL, MEMORY, 1, ROUTER, ACROSS, PDL,
        )  # fmt: skip
        c = part * COLUMNS + tl.arange(0, COLUMNS)
        if finished is not None:
            y += tl.load(finished + h * finished_h + (tl.load(held) + i) * finished_t + c).to(tl.float32)
        tl.store(out + row * P + c, y)
    else:
        p, to = tl.arange(0, P), tl.load(held) + i
        wait(PDL)
        if h < KEY_HEADS:
            own = (h * PLACES + to) * P + p
            k = _finished(key + h * key_h + i * key_n, p < P, key_norm, key_eps, cos, sin, i, P)
            tl.store(beside_keys + own, k)
            tl.store(beside_values + own, tl.load(value + h * value_h + i * value_n + p))
        if write is not None:
            own = h * PLACES + to
            if h < WRITERS:
                logits = write + h * write_h + i * write_n
                gate = finished_gate(logits, write_shift, write_log_rate, h, WRITE_ACTIVATION)
                tl.store(beside_write + own, gate)
                if decay is not None:
                    logits = decay + h * decay_h + i * decay_n
                    gate = finished_gate(logits, decay_shift, decay_log_rate, h, DECAY_ACTIVATION)
                    tl.store(beside_decay + own, gate)

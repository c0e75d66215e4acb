"""The second kernel of `ahn.ops.step.kernel`: joins the parts of each head, and puts the new token into its slot."""

from __future__ import annotations

import triton
import triton.language as tl

from ahn.ops.step.dependent_launch import announce, wait
from ahn.ops.step.head_kernel import finished_gate, finished_head, slot_of


@triton.jit
def combine_and_keep(
    partial, score, read, gamma, weight, norm, o_proj, out,
    key, value, new_write, write_shift, write_log_rate, new_decay, decay_shift, decay_log_rate,
    key_norm, cos, sin, key_eps, stride_turn,
    keys, values, write, decay, positions, active, slots, sinks, norm_eps,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr,
    COLUMNS: tl.constexpr, ALL: tl.constexpr, MEMORY: tl.constexpr, STATES: tl.constexpr, READERS: tl.constexpr,
    ROUTER: tl.constexpr, ACROSS: tl.constexpr, WRITE_ACTIVATION: tl.constexpr, DECAY_ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    b, h = row // HEADS, row % HEADS
    if part < P // COLUMNS:
        y = joined(
            partial, score, read, gamma, weight, norm, o_proj, norm_eps, row, b, h, part,
            SPLITS, ALL_SPLITS, HEADS, P, COLUMNS, ALL, MEMORY, STATES, ROUTER, ACROSS, PDL,
        )  # fmt: skip
        tl.store(out + row * P + part * COLUMNS + tl.arange(0, COLUMNS), y)
    else:  # a program of its own, so that nobody's result is late for it
        position, real = tl.load(positions + b), tl.load(active + b) != 0
        slot = slot_of(position, sinks, slots - sinks)
        head = h // GROUPS
        p = tl.arange(0, P)
        wait(PDL)
        if real & (h % GROUPS == 0):
            if cos is not None:
                cos += b * stride_turn
                sin += b * stride_turn
            new = (b * (HEADS // GROUPS) + head) * P
            keys += b.to(tl.int64) * stride_kb + head * stride_kh + slot * stride_kt
            values += b.to(tl.int64) * stride_vb + head * stride_vh + slot * stride_vt
            tl.store(keys + p, finished_head(key + new, p < P, key_norm, key_eps, cos, sin, P))
            tl.store(values + p, tl.load(value + new + p))
        if write is not None and real and row % READERS == 0:
            writer = row // READERS
            h = writer % (HEADS // READERS)
            at = writer.to(tl.int64) * slots + slot
            tl.store(write + at, finished_gate(new_write + writer, write_shift, write_log_rate, h, WRITE_ACTIVATION))
            if new_decay is not None:
                fade = finished_gate(new_decay + writer, decay_shift, decay_log_rate, h, DECAY_ACTIVATION)
                tl.store(decay + at, fade)


@triton.jit
def joined(
    partial, score, read, gamma, weight, norm, o_proj, norm_eps, row, b, h, part,
    SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    ALL: tl.constexpr, MEMORY: tl.constexpr, STATES: tl.constexpr, ROUTER: tl.constexpr, ACROSS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's output, float32: the parts by their weights, and the memory's read."""
    c = part * COLUMNS + tl.arange(0, COLUMNS)
    CHUNK: tl.constexpr = ALL_SPLITS if ALL_SPLITS <= 256 else 128  # for there are few registers
    n, p = tl.arange(0, CHUNK), tl.arange(0, P)
    if MEMORY:  # all loads are under way before the first result is needed; weights without waiting
        projection = tl.load(o_proj + h * P * P + p[:, None] * P + c[None, :])
        normed = tl.load(norm + (h * P + p if ACROSS else p)).to(tl.float32)
    wait(PDL)
    score += row * SPLITS
    partial += row * SPLITS * P + c[None, :]
    scores, parts = _parts(score, partial, n, SPLITS, P)
    if MEMORY:
        o = tl.load(read + row * STATES * P + p)
        for r in tl.static_range(1, STATES):
            o += tl.load(read + (row * STATES + r) * P + p)
        gate = tl.load(gamma + row).to(tl.float32)
    if ALL_SPLITS == CHUNK:
        highest = tl.max(scores, 0)
        e = tl.exp(scores - highest)
        y, total = tl.sum(parts * e[:, None], 0), tl.sum(e, 0)
    else:
        every = tl.arange(0, ALL_SPLITS)
        all_scores = tl.load(score + every, mask=every < SPLITS, other=float("-inf"))
        highest = tl.max(all_scores, 0)
        y, total = tl.zeros([COLUMNS], tl.float32), tl.sum(tl.exp(all_scores - highest), 0)
        for start in range(CHUNK, ALL_SPLITS, CHUNK):
            next_scores, next_parts = _parts(score, partial, start + n, SPLITS, P)
            y += tl.sum(parts * tl.exp(scores - highest)[:, None], 0)
            scores, parts = next_scores, next_parts  # under way while those before them are summed
        y += tl.sum(parts * tl.exp(scores - highest)[:, None], 0)
    y /= total
    if MEMORY:
        gate = gate * tl.sigmoid(gate)
        if ACROSS:
            i = tl.arange(0, ALL)
            every = tl.load(read + b * HEADS * P + i, mask=i < HEADS * P, other=0.0)
            gates = tl.load(gamma + b * HEADS + i // P, mask=i < HEADS * P, other=0.0).to(tl.float32)
            every *= gates * tl.sigmoid(gates)
            size = tl.sum(every * every) / (HEADS * P)
            o *= gate * tl.rsqrt(size + norm_eps) * normed
        else:
            o *= tl.rsqrt(tl.sum(o * o) / P + norm_eps) * normed * gate
        o = o.to(projection.dtype).to(tl.float32)
        projected = tl.sum(o[:, None] * projection.to(tl.float32), 0)
        if ROUTER:
            projected *= tl.load(weight + row)
        y += projected
    return y


@triton.jit
def _parts(score, partial, n, SPLITS: tl.constexpr, P: tl.constexpr):
    """Scores and some columns of these parts."""
    held = n < SPLITS
    scores = tl.load(score + n, mask=held, other=float("-inf"))
    return scores, tl.load(partial + n[:, None] * P, mask=held[:, None], other=0.0)

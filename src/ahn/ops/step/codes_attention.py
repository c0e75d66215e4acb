"""Attention of a step to the codes of the tier, in parts that the step's last kernel joins with those of the window.

Codes are levels that were rotated by a Hadamard matrix: a query that was rotated as well meets them as they are, scales
go into scores and weights, and what comes of the values is rotated back once, when a part is done. So it is with
keys as they leave the window, and with keys before RoPE that are seen at the farthest distance, to which the query is
turned. Keys that are seen at distances of their own are rotated back, by products of a quarter of the head's size, and
each turned by its place in a block of tokens; the query is turned to the block's first.

Each warp has tokens of its own, from their codes to what comes of them; warps meet when a part is done. A thread makes
of the words that it loads just what it multiplies, so nothing passes between threads on the way: that is what the order
of numbers in `ahn.ops.step.codes_kernel` is for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ahn.ops.step import turn
from ahn.ops.step.codes_kernel import (
    codes_of,
    in_columns,
    in_row,
    level_halves,
    levels,
    load_words,
    place_in_column,
    place_in_row,
    word_stride,
)
from ahn.ops.step.dependent_launch import announce, prefetch, wait

WARPS = 4
FAR_TOKENS = tl.constexpr(32)  # of a warp at a time; 16 of near ones, as many as the machine multiplies at once
BLOCK = tl.constexpr(turn.BLOCK)


@triton.jit
def attend_codes(
    rotated, before, farthest, offset, value_offset, keys, values, key_scales, value_scales, positions, partial, score,
    near_angles, within, hadamard, slots, capacity, near, angles, scaling, per_near, per_far, window,
    FIRST: tl.constexpr, PARTS: tl.constexpr, NEAR: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, A: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A part of the ring, for the query heads that share a key head.

    The first NEAR parts are of the newest `near` tokens, by age, which are turned; the others of those that follow.
    They are written from the FIRST on, of PARTS for each head.
    """
    announce(PDL)
    part = tl.program_id(0)
    HKV: tl.constexpr = HEADS // GROUPS
    b, head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    first, at = b * HEADS + head * GROUPS, (b * HKV + head).to(tl.int64)
    keys += at * capacity * word_stride(P, KEY_BITS)
    values += at * capacity * word_stride(P, VALUE_BITS)
    key_scales += at * capacity
    value_scales += at * capacity
    offset += at * P
    gone = tl.load(positions + b).to(tl.int32) - slots  # the newest token of the ring, from the first that left
    held = tl.minimum(gone + 1, capacity)
    newest = gone % capacity
    begin = near + (part - NEAR) * per_far
    end = tl.minimum(begin + per_far, held)
    if NEAR == 0:  # noqa: SIM114  (known when it is compiled: then there are no angles to compile the rest with)
        highest, total, acc = _alike(
            rotated + first * P, farthest + first * P, offset, keys, values, key_scales, value_scales, newest,
            capacity, begin, end, scaling, window.dtype.element_ty, GROUPS, ROWS, P, A, KEY_BITS, VALUE_BITS,
            KEY_BYTES, VALUE_BYTES, PRECISION, PDL,
        )  # fmt: skip
    elif part >= NEAR:
        highest, total, acc = _alike(
            rotated + first * P, farthest + first * P, offset, keys, values, key_scales, value_scales, newest,
            capacity, begin, end, scaling, window.dtype.element_ty, GROUPS, ROWS, P, A, KEY_BITS, VALUE_BITS,
            KEY_BYTES, VALUE_BYTES, PRECISION, PDL,
        )  # fmt: skip
    else:
        begin = part * per_near
        end = tl.minimum(tl.minimum(begin + per_near, near), held)
        highest, total, acc = _near(
            before + first * P, offset, keys, values, key_scales, value_scales, near_angles, within, angles, newest,
            capacity, begin, end, scaling, window.dtype.element_ty, GROUPS, ROWS, P, A, KEY_BITS, VALUE_BITS,
            KEY_BYTES, VALUE_BYTES, PRECISION, PDL,
        )  # fmt: skip
    # Of the warps one sum.
    top = tl.max(highest, 0)
    keep = tl.exp(highest - tl.where(top == float("-inf"), 0.0, top)[None, :])
    total = tl.sum(total * keep, 0)
    total = tl.where(total == 0.0, 1.0, total)
    found = tl.sum(acc * keep[:, None, :], 0) / total[None, :]
    # Rotated back, in the same order: it moves the bits of a number's index, in rows and columns of the matrix alike.
    AT_ONCE: tl.constexpr = P if P < 64 else 64  # of its rows, for a whole one may be more than a multiprocessor holds
    p, g = tl.arange(0, P), tl.arange(0, ROWS)
    row = (first + g) * PARTS + FIRST + part
    TYPE: tl.constexpr = hadamard.dtype.element_ty
    rounded = found.to(TYPE)
    for start in range(0, P, AT_ONCE):
        rows = start + tl.arange(0, AT_ONCE)
        H = tl.load(hadamard + rows[:, None] * P + p[None, :])
        back = tl.dot(H, rounded, input_precision=PRECISION)
        if tl.float32 != TYPE:  # what the rounded sum is short of: parts are float32
            back = tl.dot(H, (found - rounded.to(tl.float32)).to(TYPE), back, input_precision=PRECISION)
        to = place_in_column(rows, P, VALUE_BITS)
        out = back / tl.sqrt(P * 1.0) + tl.load(value_offset + at * P + to)[:, None]
        tl.store(partial + row[None, :] * P + to[:, None], out, mask=(g < GROUPS)[None, :])
    tl.store(score + row, top + tl.log(total), mask=g < GROUPS)


@triton.jit
def _ask(
    keys, values, newest, capacity, begin, end, P: tl.constexpr, N: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Let the codes of a part come into the L2 cache."""
    for start in range(begin, end, N):
        _, t = _slots_of(start + tl.arange(0, N), end, newest, capacity)
        prefetch(keys + t * word_stride(P, KEY_BITS), PDL)
        prefetch(values + t * word_stride(P, VALUE_BITS), PDL)


@triton.jit
def _alike(
    rotated, farthest, offset, keys, values, key_scales, value_scales, newest, capacity, begin, end, scaling,
    DTYPE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, A: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tokens of these ages, which the same query meets."""
    C: tl.constexpr = codes_of(KEY_BITS)
    p, g = tl.arange(0, P), tl.arange(0, ROWS)
    word, place = place_in_row(p, P // C, C)
    mine = (g < GROUPS)[None, :]
    _ask(keys, values, newest, capacity, begin, end, P, A * FAR_TOKENS, KEY_BITS, VALUE_BITS, PDL)
    wait(PDL)
    query = tl.load(rotated + g[None, :] * P + (word * C + place)[:, None], mask=mine, other=0.0)
    plain = tl.load(farthest + g[None, :] * P + p[:, None], mask=mine, other=0.0)
    shared = tl.sum(plain * tl.load(offset + p)[:, None], 0) * scaling
    q = tl.broadcast_to(query.to(DTYPE)[None, :, :], [A, P, ROWS])
    N: tl.constexpr = FAR_TOKENS
    own = tl.arange(0, A)[:, None] * N + tl.arange(0, N)[None, :]
    highest = tl.full([A, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([A, ROWS], tl.float32)
    acc = tl.zeros([A, P, ROWS], tl.float32)
    for start in tl.range(begin, end, A * N, num_stages=1):
        inside, t = _slots_of(start + own, end, newest, capacity)
        key_scale = tl.load(key_scales + t).to(tl.float32) * scaling
        value_scale = tl.load(value_scales + t).to(tl.float32)
        key_words = load_words(keys, t, 0, P, P, KEY_BITS)
        value_words = load_words(values, t, 0, P, P, VALUE_BITS)
        s = tl.dot(in_row(levels(key_words, KEY_BITS, DTYPE, KEY_BYTES)), q, input_precision=PRECISION)
        s = tl.where(inside[:, :, None], s * key_scale[:, :, None], float("-inf"))
        v = in_columns(levels(value_words, VALUE_BITS, DTYPE, VALUE_BYTES))
        highest, total, acc = _added(s, v, value_scale, highest, total, acc, PRECISION)
    return highest + shared[None, :], total, acc


@triton.jit
def _near(
    before, offset, keys, values, key_scales, value_scales, near_angles, within, angles, newest, capacity, begin, end,
    scaling,
    DTYPE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, A: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tokens of these ages, each at its own distance from queries that come before RoPE; `begin` begins a block.

    Of pairs (x, y) the first half of a head has x and the second y. With a = (x + y) / 2 and b = (x - y) / 2, which is
    how a Hadamard matrix ends, a key turned by an angle with u = cos + sin and v = cos - sin is (a u + b v, a v - b u).
    Numbers of codes are small, so float16 is precise enough for them. The keys' mean is far larger in some heads: what
    it adds to scores is worked out from the query, by products of u and v that are float16 as well.
    """
    N: tl.constexpr = BLOCK // A
    HALF: tl.constexpr = P // 2
    QUARTER: tl.constexpr = P // 4
    KTYPE: tl.constexpr = tl.float16 if DTYPE != tl.float32 else DTYPE  # noqa: SIM300
    C: tl.constexpr = codes_of(KEY_BITS)
    TOP: tl.constexpr = C // 2
    W: tl.constexpr = HALF // C
    # Pairs whose place in their word is low; the others are TOP further.
    low, g = _pair(tl.arange(0, QUARTER), C), tl.arange(0, ROWS)
    word, place = place_in_row(tl.arange(0, QUARTER), W, TOP)
    bits = (word * C + place)[:, None] & low[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    H = (1 - 2 * (bits & 1)).to(tl.float32).to(KTYPE)
    H = tl.broadcast_to(H[None, :, :], [A, QUARTER, QUARTER])
    own = tl.arange(0, A)[:, None] * N + tl.arange(0, N)[None, :]
    table = within + own[:, :, None] * HALF + low[None, None, :]
    cos, sin = tl.load(table), tl.load(table + A * N * HALF)
    u_low, v_low = (cos + sin).to(KTYPE), (cos - sin).to(KTYPE)
    cos, sin = tl.load(table + TOP), tl.load(table + A * N * HALF + TOP)
    u_high, v_high = (cos + sin).to(KTYPE), (cos - sin).to(KTYPE)
    turns = _beside(u_low, u_high, v_low, v_high)
    x = tl.arange(0, P)  # in the order of `_beside`
    pair = _pair(_place_beside(x % QUARTER, QUARTER), C) + x // QUARTER % 2 * TOP
    sign = (x // HALF * 2 - 1).to(tl.float32)
    number, partner = pair + x // HALF * HALF, pair + (1 - x // HALF) * HALF
    mine = (g < GROUPS)[:, None]
    _ask(keys, values, newest, capacity, begin, end, P, BLOCK, KEY_BITS, VALUE_BITS, PDL)
    wait(PDL)
    q_own = tl.load(before + g[:, None] * P + number[None, :], mask=mine, other=0.0) * scaling
    q_partner = tl.load(before + g[:, None] * P + partner[None, :], mask=mine, other=0.0) * (scaling * sign)[None, :]
    mean_own, mean_partner = tl.load(offset + number)[None, :], tl.load(offset + partner)[None, :]
    highest = tl.full([A, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([A, ROWS], tl.float32)
    acc = tl.zeros([A, P, ROWS], tl.float32)
    for start in tl.range(begin, end, A * N, num_stages=1):
        inside, t = _slots_of(start + own, end, newest, capacity)
        key_scale = tl.load(key_scales + t).to(tl.float32) / tl.sqrt(P * 1.0)
        value_scale = tl.load(value_scales + t).to(tl.float32)
        first_words = load_words(keys, t, 0, HALF, P, KEY_BITS)
        second_words = load_words(keys, t, HALF, HALF, P, KEY_BITS)
        value_words = load_words(values, t, 0, P, P, VALUE_BITS)
        block = near_angles + (start // (A * N)) * HALF + pair
        c, s = tl.load(block)[None, :], tl.load(block + angles)[None, :]
        q = q_own * c + q_partner * s
        other = (q_partner * c - q_own * s) * sign[None, :]
        m = (q * (mean_own + mean_partner) + other * (mean_partner - mean_own)) * 0.5
        q = tl.broadcast_to(tl.trans(q.to(KTYPE))[None, :, :], [A, P, ROWS])
        m = tl.broadcast_to(tl.trans(m.to(KTYPE))[None, :, :], [A, P, ROWS])
        l1, h1 = level_halves(first_words, KEY_BITS, KTYPE, KEY_BYTES)
        l2, h2 = level_halves(second_words, KEY_BITS, KTYPE, KEY_BYTES)
        l1, h1 = _product(in_row(l1), H, PRECISION).to(KTYPE), _product(in_row(h1), H, PRECISION).to(KTYPE)
        l2, h2 = _product(in_row(l2), H, PRECISION).to(KTYPE), _product(in_row(h2), H, PRECISION).to(KTYPE)
        low1, low2 = _turned(l1 + h1, l2 + h2, u_low, v_low, KEY_BYTES)
        high1, high2 = _turned(l1 - h1, l2 - h2, u_high, v_high, KEY_BYTES)
        s = tl.dot(_beside(low1, high1, low2, high2), q, input_precision=PRECISION) * key_scale[:, :, None]
        s = tl.where(inside[:, :, None], tl.dot(turns, m, s, input_precision=PRECISION), float("-inf"))
        v = in_columns(levels(value_words, VALUE_BITS, DTYPE, VALUE_BYTES))
        highest, total, acc = _added(s, v, value_scale, highest, total, acc, PRECISION)
    return highest, total, acc


@triton.jit
def _product(x, H, PRECISION: tl.constexpr):
    """Of x (A, N, K) and H (A, K, K); the machine multiplies 16 numbers at once."""
    if x.shape[2] >= 16:
        y = tl.dot(x, H, input_precision=PRECISION)
    else:
        y = tl.sum(x[:, :, :, None].to(tl.float32) * H[:, None, :, :].to(tl.float32), 2)
    return y


@triton.jit
def _added(s, v, value_scale, highest, total, acc, PRECISION: tl.constexpr):
    """The softmax over what came before and scores s (A, N, ROWS) of values v (A, P, N); a warp may have none."""
    new = tl.maximum(highest, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp(highest - base)
    e = tl.exp(s - base[:, None, :])
    weight = (e * value_scale[:, :, None]).to(v.dtype)
    acc = tl.dot(v, weight, acc * keep[:, None, :], input_precision=PRECISION)
    return new, total * keep + tl.sum(e, 1), acc


@triton.jit
def _slots_of(ages, end, newest, capacity):
    """Which of these ages count, and where their tokens lie, 0 being in the slot `newest`; others lie there too."""
    t = newest - tl.minimum(ages, end - 1)
    return ages < end, tl.where(t < 0, t + capacity, t)


@triton.jit
def _pair(n, C: tl.constexpr):
    """The n-th number whose place in its word of C codes is in the lower half."""
    return n // (C // 2) * C + n % (C // 2)


_TURN = tl.constexpr(
    "{.reg .b32 x; mul.rn.f16x2 x, $3, $5; fma.rn.f16x2 $0, $2, $4, x;"
    "mul.rn.f16x2 x, $3, $4; neg.f16x2 x, x; fma.rn.f16x2 $1, $2, $5, x;}"
)


@triton.jit
def _turned(a, b, u, v, BY_TWO: tl.constexpr):
    """(a u + b v, a v - b u), of float16 two at a time."""
    if BY_TWO:
        x, y = tl.inline_asm_elementwise(
            _TURN, "=&r,=&r,r,r,r,r", [a, b, u, v], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        x, y = a * u + b * v, a * v - b * u
    return x, y


@triton.jit
def _beside(a, b, c, d):
    """Four (A, N, K), as products give them, as one (A, N, 4 K), as products take it: see `_place_beside`."""
    A: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[1]
    K: tl.constexpr = a.shape[2]
    x = tl.join(tl.join(a, b), tl.join(c, d))
    if K >= 16:
        y = tl.permute(tl.reshape(x, [A, N, K // 16, 2, 4, 2, 2, 2]), (0, 1, 7, 6, 2, 4, 3, 5))
    else:
        y = tl.permute(x, (0, 1, 4, 3, 2))
    return tl.reshape(y, [A, N, 4 * K])


@triton.jit
def _place_beside(k, K: tl.constexpr):
    """Which number of each of the four stands in its place k."""
    return k % 2 + k // 4 % 4 * 2 + k // 2 % 2 * 8 + k // 16 * 16 if K >= 16 else k

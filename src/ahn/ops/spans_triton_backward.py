"""The backward kernels of `ahn.ops.spans`, on the same lists of blocks as the forward one.

One gives the gradient of queries, block by block. The other gives that of keys, values and biases, and adds up the
query heads of a group inside one program: nothing is added by atomics, so the same inputs always give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.spans_blocks import blocks, tiles
from ahn.ops.spans_triton import LENGTHS, LOG2E, _columns, _logits, _tile, by_rows, sizes, span_arguments, strides

DELTA_ROWS = 64
# Sinks are seen by all queries, other keys by a window's worth: a single program for a block of sinks would still run
# when all others are done. So the blocks that are seen most are split; few, for every part takes memory.
PARTS = 8
MOST_SPLIT = 8


@triton.jit
def _delta(out, gradient, delta, n, ob, oh, ot, gb, gh, gt, HEADS: tl.constexpr, P: tl.constexpr, M: tl.constexpr):
    """Output times its gradient, summed over a head: (B, Hq, n)."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    first = tl.program_id(0) * M
    i, p = tl.arange(0, M), tl.arange(0, P)
    x = _tile(out + b * ob + h * oh, first, i, p, ot, n, P, True).to(tl.float32)
    g = _tile(gradient + b * gb + h * gh, first, i, p, gt, n, P, True).to(tl.float32)
    tl.store(delta + row * n + first + i, tl.sum(x * g, 1), mask=first + i < n)


@triton.jit
def _back_to_queries(
    acc, q, g, lse, d, i, first, key, value, until, bias, since, index, begin, stop, before, T, kt, vt, scale,
    P: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o, p = tl.arange(0, N), tl.arange(0, P)
    start = tl.load(index + begin, mask=begin < stop, other=0) * N
    for j in range(begin, stop):
        c = (start + o)[None, :]
        k = _tile(key, start, o, p, kt, T, P, MASKED)
        v = _tile(value, start, o, p, vt, T, P, MASKED)
        s = tl.dot(q, k.trans(), input_precision=PRECISION)
        end, from_, b = _columns(until, bias, since, c, T, MASKED, BIAS)
        x = _logits(s, i, c, first, before, end, from_, b, scale, MASKED, BIAS)
        e = tl.exp2(x - lse[:, None])
        ds = e * (tl.dot(g, v.trans(), input_precision=PRECISION) - d[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        start = tl.load(index + tl.minimum(j + 1, stop - 1)) * N
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def _backward_queries(
    query, key, value, until, bias, since, index, count, score, gradient, delta, of_query, n, T, scale, scaling,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, ob, oh, ot, ub, uh, sb, sh, xb, xh, columns,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    head = h // GROUPS
    first = block * M
    o, p = tl.arange(0, M), tl.arange(0, P)
    i, real = (first + o)[:, None], first + o < n
    q = _tile(query + b * qb + h * qh, first, o, p, qt, n, P, True)
    g = _tile(gradient + b * gb + h * gh, first, o, p, gt, n, P, True)
    lse = tl.load(score + row * n + first + o, mask=real, other=float("inf"))
    d = tl.load(delta + row * n + first + o, mask=real, other=0.0)
    key += b * kb + head * kh
    value += b * vb + head * vh
    until += b * ub + head * uh
    since += b * sb + head * sh
    bias += (b * (HEADS // GROUPS) + head) * T
    at = b * xb + head * xh + block
    whole, some = tl.load(count + at * 2), tl.load(count + at * 2 + 1)
    index += at * columns
    acc = tl.zeros([M, P], tl.float32)
    acc = _back_to_queries(
        acc, q, g, lse, d, i, first, key, value, until, bias, since, index, 0, whole, T - n, T, kt, vt, scale,
        P, N, False, BIAS, PRECISION,
    )  # fmt: skip
    acc = _back_to_queries(
        acc, q, g, lse, d, i, first, key, value, until, bias, since, index, whole, some, T - n, T, kt, vt, scale,
        P, N, True, BIAS, PRECISION,
    )  # fmt: skip
    to = of_query + b * ob + h * oh + first.to(tl.int64) * ot + o[:, None] * ot + p[None, :]
    tl.store(to, acc * scaling, mask=real[:, None])


@triton.jit
def _back_to_keys(
    dk, dv, db, k, v, c, end, start, bias, query, gradient, score, delta, index, begin, count, part, parts,
    before, n, qh, qt, gh, gt, scale,
    GROUPS: tl.constexpr, P: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of: `count` query blocks of a list, from `begin`, of each head of the group."""
    o, p = tl.arange(0, M), tl.arange(0, P)
    j0, j1 = part * count * GROUPS // parts, (part + 1) * count * GROUPS // parts
    first = tl.load(index + begin + j0 % tl.maximum(count, 1), mask=count > 0, other=0) * M
    for j in range(j0, j1):
        head = (j // count).to(tl.int64)
        i = (first + o)[None, :]
        q = _tile(query + head * qh, first, o, p, qt, n, P, MASKED)
        at = head * n + first + o
        if MASKED:
            lse = tl.load(score + at, mask=first + o < n, other=float("inf"))
            d = tl.load(delta + at, mask=first + o < n, other=0.0)
        else:
            lse, d = tl.load(score + at), tl.load(delta + at)
        s = tl.dot(k, q.trans(), input_precision=PRECISION)
        x = _logits(s, i, c, first, before, end, start, bias, scale, MASKED, BIAS)
        e = tl.exp2(x - lse[None, :])
        g = _tile(gradient + head * gh, first, o, p, gt, n, P, MASKED)
        dv = tl.dot(e.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = e * (tl.dot(v, g.trans(), input_precision=PRECISION) - d[None, :])
        if BIAS:
            db += tl.sum(tl.where((i if MASKED else first) >= start, ds, 0.0), 1)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        first = tl.load(index + begin + (j + 1) % count) * M
    return dk, dv, db


@triton.jit
def _store_keys(of_key, of_value, of_bias, dk, dv, db, o, p, stride, stop, BIAS: tl.constexpr):
    """The first `stop` rows of a block."""
    to = o[:, None] * stride + p[None, :]
    tl.store(of_key + to, dk, mask=(o < stop)[:, None])
    tl.store(of_value + to, dv, mask=(o < stop)[:, None])
    if BIAS:
        tl.store(of_bias + o, db, mask=o < stop)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_keys(
    query, key, value, until, bias, since, index, count, score, gradient, delta, order, work, of_key, of_value, of_bias,
    n, T, scale, scaling,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, wb, wh, wt, ub, uh, sb, sh, xb, xh, columns, split,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    HKV: tl.constexpr = HEADS // GROUPS
    row = tl.program_id(1).to(tl.int64)
    b, head = row // HKV, row % HKV
    # The `split` blocks that are seen most come first, in parts; then all others.
    program = tl.program_id(0)
    whole_blocks = program - split * PARTS
    part, parts = tl.where(whole_blocks < 0, program % PARTS, 0), tl.where(whole_blocks < 0, PARTS, 1)
    rank = tl.where(whole_blocks < 0, program // PARTS, split + whole_blocks)
    lists = b * xb + head * xh
    block = tl.load(order + lists + rank)
    first = block * N
    o, p = tl.arange(0, N), tl.arange(0, P)
    k = _tile(key + b * kb + head * kh, first, o, p, kt, T, P, True)
    v = _tile(value + b * vb + head * vh, first, o, p, vt, T, P, True)
    c = (first + o)[:, None]
    end, start, x = _columns(until + b * ub + head * uh, bias + row * T, since + b * sb + head * sh, c, T, True, BIAS)
    query += b * qb + head * GROUPS * qh
    gradient += b * gb + head * GROUPS * gh
    score += (b * HEADS + head * GROUPS) * n
    delta += (b * HEADS + head * GROUPS) * n
    at = lists + block
    whole, some = tl.load(count + at * 2), tl.load(count + at * 2 + 1)
    index += at * columns
    dk, dv = tl.zeros([N, P], tl.float32), tl.zeros([N, P], tl.float32)
    db = tl.zeros([N], tl.float32)
    dk, dv, db = _back_to_keys(
        dk, dv, db, k, v, c, end, start, x, query, gradient, score, delta, index, 0, whole, part, parts,
        T - n, n, qh, qt, gh, gt, scale, GROUPS, P, M, False, BIAS, PRECISION,
    )  # fmt: skip
    dk, dv, db = _back_to_keys(
        dk, dv, db, k, v, c, end, start, x, query, gradient, score, delta, index, whole, some - whole, part, parts,
        T - n, n, qh, qt, gh, gt, scale, GROUPS, P, M, True, BIAS, PRECISION,
    )  # fmt: skip
    dk *= scaling
    if whole_blocks < 0:
        work += (row * split * PARTS + program) * N * (2 * P + 1)
        _store_keys(work, work + N * P, work + 2 * N * P, dk, dv, db, o, p, P, N, BIAS)
    else:
        to = b * wb + head * wh + first.to(tl.int64) * wt
        _store_keys(of_key + to, of_value + to, of_bias + row * T + first, dk, dv, db, o, p, wt, T - first, BIAS)


@triton.jit(do_not_specialize=LENGTHS)
def _join_parts(
    work, order, of_key, of_value, of_bias, T, wb, wh, wt, xb, xh,
    HKV: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums of the parts of a block that was split."""
    rank, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = row // HKV, row % HKV
    first = tl.load(order + b * xb + head * xh + rank) * N
    o, p = tl.arange(0, N), tl.arange(0, P)
    tile = o[:, None] * P + p[None, :]
    dk, dv, db = tl.zeros([N, P], tl.float32), tl.zeros([N, P], tl.float32), tl.zeros([N], tl.float32)
    work += (row * tl.num_programs(0) + rank) * PARTS * N * (2 * P + 1)
    for _ in range(PARTS):
        dk += tl.load(work + tile)
        dv += tl.load(work + N * P + tile)
        if BIAS:
            db += tl.load(work + 2 * N * P + o)
        work += N * (2 * P + 1)
    to = b * wb + head * wh + first.to(tl.int64) * wt
    _store_keys(of_key + to, of_value + to, of_bias + row * T + first, dk, dv, db, o, p, wt, T - first, BIAS)


def delta(out: Tensor, gradient: Tensor) -> Tensor:
    """Output times its gradient (B, Hq, n, P), summed over each head: (B, Hq, n) float32."""
    B, HEADS, n, P = out.shape
    found = torch.empty(B, HEADS, n, dtype=torch.float32, device=out.device)
    _delta[triton.cdiv(n, DELTA_ROWS), B * HEADS](
        out, gradient, found, n, *strides(out, gradient), HEADS=HEADS, P=P, M=DELTA_ROWS
    )
    return found


def queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    until: Tensor,
    scaling: float,
    bias: Tensor | None,
    biased_from: Tensor | None,
    score: Tensor,
    gradient: Tensor,
    delta: Tensor,
) -> Tensor:
    """Gradient of the queries (B, Hq, n, P).

    Args:
        score: of the forward pass.
        gradient: (B, Hq, n, P) of its output.
        delta: see `delta`.
    """
    B, HEADS, n, P = query.shape
    tile = tiles("queries", query)
    lists = blocks(until, biased_from, n, tile, by_key=False)
    spans, span_strides = span_arguments(key, until, bias, biased_from, lists)
    query, key, value = by_rows(query), by_rows(key), by_rows(value)
    found = torch.empty(B, n, HEADS, P, dtype=query.dtype, device=query.device).transpose(1, 2)
    _backward_queries[triton.cdiv(n, tile.queries), B * HEADS](
        query, key, value, *spans, score, gradient, delta, found, n, key.shape[2], scaling * LOG2E.value, scaling,
        *strides(query, key, value, gradient, found), *span_strides, **sizes(query, key, tile, bias),
    )  # fmt: skip
    return found


def keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    until: Tensor,
    scaling: float,
    bias: Tensor | None,
    biased_from: Tensor | None,
    score: Tensor,
    gradient: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of keys and values (B, Hkv, T, P) and of the bias (B, Hkv, T); arguments as for `queries`."""
    B, HKV, T, P = key.shape
    tile = tiles("keys", query)
    lists = blocks(until, biased_from, query.shape[2], tile, by_key=True)
    spans, span_strides = span_arguments(key, until, bias, biased_from, lists)
    query, key, value = by_rows(query), by_rows(key), by_rows(value)
    of_key, of_value = (torch.empty(B, T, HKV, P, dtype=key.dtype, device=key.device).transpose(1, 2) for _ in range(2))
    of_bias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    given = delta if of_bias is None else of_bias  # a pointer that is not used without a bias
    N, total = tile.keys, triton.cdiv(T, tile.keys)
    split = min(MOST_SPLIT, triton.cdiv(total, 16))
    order = lists.count[..., 1].argsort(dim=-1, descending=True, stable=True).int()
    work = torch.empty(B * HKV * split * PARTS * N * (2 * P + 1), dtype=torch.float32, device=key.device)
    _backward_keys[total + split * (PARTS - 1), B * HKV](
        query, key, value, *spans, score, gradient, delta, order, work, of_key, of_value, given,
        query.shape[2], T, scaling * LOG2E.value, scaling,
        *strides(query, key, value, gradient, of_key), *span_strides, split,
        **sizes(query, key, tile, bias), PARTS=PARTS,
    )  # fmt: skip
    _join_parts[split, B * HKV](
        work, order, of_key, of_value, given, T, *strides(of_key), *span_strides[4:6],
        HKV=HKV, P=P, N=N, BIAS=bias is not None, PARTS=PARTS, num_warps=8,
    )  # fmt: skip
    return of_key, of_value, of_bias

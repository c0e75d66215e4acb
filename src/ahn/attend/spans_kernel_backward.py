"""The backward kernels of `ahn.attend.spans`, on the same lists of blocks as the forward one.

One gives the gradient of queries, block by block. The other gives that of keys and values, and adds up the query
heads of a group inside one program: nothing is added by atomics, so the same inputs always give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.attend.spans_blocks import Columns, tiles
from ahn.attend.spans_kernel import LENGTHS, LOG2E, _masked, _tile, by_rows, sizes, span_arguments, strides

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
    acc, q, g, lse, d, i, key, value, until, index, begin, stop, before, T, kt, vt, scale,
    P: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o, p = tl.arange(0, N), tl.arange(0, P)
    start = tl.load(index + begin, mask=begin < stop, other=0) * N
    for j in range(begin, stop):
        c = (start + o)[None, :]
        k = _tile(key, start, o, p, kt, T, P, MASKED)
        v = _tile(value, start, o, p, vt, T, P, MASKED)
        s = tl.dot(q, k.trans(), input_precision=PRECISION)
        if MASKED:
            end = tl.load(until + c, mask=c < T, other=0)
            x = _masked(s * scale, i, c, before, end)
        else:
            x = s * scale
        e = tl.exp2(x - lse[:, None])
        ds = e * (tl.dot(g, v.trans(), input_precision=PRECISION) - d[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        start = tl.load(index + tl.minimum(j + 1, stop - 1)) * N
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def _backward_queries(
    query, key, value, until, index, count, score, gradient, delta, of_query, n, T, scale, scaling,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, ob, oh, ot, ub, uh, xb, xh, columns,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr,
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
    at = b * xb + head * xh + block
    whole, some = tl.load(count + at * 2), tl.load(count + at * 2 + 1)
    index += at * columns
    acc = tl.zeros([M, P], tl.float32)
    acc = _back_to_queries(
        acc, q, g, lse, d, i, key, value, until, index, 0, whole, T - n, T, kt, vt, scale,
        P, N, False, PRECISION,
    )  # fmt: skip
    acc = _back_to_queries(
        acc, q, g, lse, d, i, key, value, until, index, whole, some, T - n, T, kt, vt, scale,
        P, N, True, PRECISION,
    )  # fmt: skip
    to = of_query + b * ob + h * oh + first.to(tl.int64) * ot + o[:, None] * ot + p[None, :]
    tl.store(to, acc * scaling, mask=real[:, None])


@triton.jit
def _back_to_keys(
    dk, dv, k, v, c, end, query, gradient, score, delta, index, begin, count, part, parts,
    before, n, qh, qt, gh, gt, scale,
    GROUPS: tl.constexpr, P: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
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
        x = s * scale
        if MASKED:
            x = _masked(x, i, c, before, end)
        e = tl.exp2(x - lse[None, :])
        g = _tile(gradient + head * gh, first, o, p, gt, n, P, MASKED)
        dv = tl.dot(e.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = e * (tl.dot(v, g.trans(), input_precision=PRECISION) - d[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        first = tl.load(index + begin + (j + 1) % count) * M
    return dk, dv


@triton.jit
def _store_keys(of_key, of_value, dk, dv, o, p, stride, stop):
    """The first `stop` rows of a block."""
    to = o[:, None] * stride + p[None, :]
    tl.store(of_key + to, dk, mask=(o < stop)[:, None])
    tl.store(of_value + to, dv, mask=(o < stop)[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def _backward_keys(
    query, key, value, until, index, count, score, gradient, delta, order, work, of_key, of_value,
    n, T, scale, scaling,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, wb, wh, wt, ub, uh, xb, xh, columns, split,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
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
    until += b * ub + head * uh
    end = tl.load(until + c, mask=c < T, other=0)
    query += b * qb + head * GROUPS * qh
    gradient += b * gb + head * GROUPS * gh
    score += (b * HEADS + head * GROUPS) * n
    delta += (b * HEADS + head * GROUPS) * n
    at = lists + block
    whole, some = tl.load(count + at * 2), tl.load(count + at * 2 + 1)
    index += at * columns
    dk, dv = tl.zeros([N, P], tl.float32), tl.zeros([N, P], tl.float32)
    dk, dv = _back_to_keys(
        dk, dv, k, v, c, end, query, gradient, score, delta, index, 0, whole, part, parts,
        T - n, n, qh, qt, gh, gt, scale, GROUPS, P, M, False, PRECISION,
    )  # fmt: skip
    dk, dv = _back_to_keys(
        dk, dv, k, v, c, end, query, gradient, score, delta, index, whole, some - whole, part, parts,
        T - n, n, qh, qt, gh, gt, scale, GROUPS, P, M, True, PRECISION,
    )  # fmt: skip
    dk *= scaling
    if whole_blocks < 0:
        work += (row * split * PARTS + program) * (2 * N * P)
        _store_keys(work, work + N * P, dk, dv, o, p, P, N)
    else:
        to = b * wb + head * wh + first.to(tl.int64) * wt
        _store_keys(of_key + to, of_value + to, dk, dv, o, p, wt, T - first)


@triton.jit(do_not_specialize=LENGTHS)
def _join_parts(
    work, order, of_key, of_value, T, wb, wh, wt, xb, xh,
    HKV: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums of the parts of a block that was split."""
    rank, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = row // HKV, row % HKV
    first = tl.load(order + b * xb + head * xh + rank) * N
    o, p = tl.arange(0, N), tl.arange(0, P)
    tile = o[:, None] * P + p[None, :]
    dk, dv = tl.zeros([N, P], tl.float32), tl.zeros([N, P], tl.float32)
    work += (row * tl.num_programs(0) + rank) * PARTS * 2 * N * P
    for _ in range(PARTS):
        dk += tl.load(work + tile)
        dv += tl.load(work + N * P + tile)
        work += 2 * N * P
    to = b * wb + head * wh + first.to(tl.int64) * wt
    _store_keys(of_key + to, of_value + to, dk, dv, o, p, wt, T - first)


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
    columns: Columns,
    scaling: float,
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
    spans, span_strides = span_arguments(columns, columns.lists(tile))
    query, key, value = by_rows(query), by_rows(key), by_rows(value)
    found = torch.empty(B, n, HEADS, P, dtype=query.dtype, device=query.device).transpose(1, 2)
    _backward_queries[triton.cdiv(n, tile.queries), B * HEADS](
        query, key, value, *spans, score, gradient, delta, found, n, key.shape[2], scaling * LOG2E.value, scaling,
        *strides(query, key, value, gradient, found), *span_strides, **sizes(query, key, tile),
    )  # fmt: skip
    return found


def keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Columns,
    scaling: float,
    score: Tensor,
    gradient: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values (B, Hkv, T, P); arguments as for `queries`."""
    B, HKV, T, P = key.shape
    tile = tiles("keys", query)
    lists = columns.lists(tile, by_key=True)
    spans, span_strides = span_arguments(columns, lists)
    query, key, value = by_rows(query), by_rows(key), by_rows(value)
    of_key, of_value = (torch.empty(B, T, HKV, P, dtype=key.dtype, device=key.device).transpose(1, 2) for _ in range(2))
    N, total = tile.keys, triton.cdiv(T, tile.keys)
    split = min(MOST_SPLIT, triton.cdiv(total, 16))
    work = torch.empty(B * HKV * split * PARTS * 2 * N * P, dtype=torch.float32, device=key.device)
    _backward_keys[total + split * (PARTS - 1), B * HKV](
        query, key, value, *spans, score, gradient, delta, lists.order, work, of_key, of_value,
        query.shape[2], T, scaling * LOG2E.value, scaling,
        *strides(query, key, value, gradient, of_key), *span_strides, split,
        **sizes(query, key, tile), PARTS=PARTS,
    )  # fmt: skip
    _join_parts[split, B * HKV](
        work, lists.order, of_key, of_value, T, *strides(of_key), *span_strides[2:4],
        HKV=HKV, P=P, N=N, PARTS=PARTS, num_warps=8,
    )  # fmt: skip
    return of_key, of_value

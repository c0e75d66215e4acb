"""Forward kernel of `ahn.attend.spans`: attention in blocks (FlashAttention-2, arXiv 2307.08691), skipping the unseen.

For each block of queries a list of the key blocks that some of its queries see is made beforehand (see
`ahn.attend.spans_blocks`): first the blocks that all of them see whole, which need no masks, then the others. Block
sizes are fixed: nothing is tuned at first use. Exponentials are powers of two; `score` is the logarithm to base 2 of a
query's sum of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.attend.spans_blocks import Blocks, Columns, Tiles, tiles

LOG2E = tl.constexpr(math.log2(math.e))
# Arguments that change with the lengths of a batch: new values must not make Triton compile again.
LENGTHS = ("n", "T", "ub", "uh", "xb", "xh", "columns", "split")


@triton.jit
def _masked(x, i, c, before, end):
    """Scores of queries i and columns c, minus infinity where a query does not see a column."""
    return tl.where((c - before <= i) & (i < end), x, float("-inf"))


@triton.jit
def _tile(base, start, offset, p, stride, stop, P: tl.constexpr, MASKED: tl.constexpr):
    """Rows start + offset of a (rows, P) matrix; zeros from row `stop` on."""
    at = base + start.to(tl.int64) * stride + offset[:, None] * stride + p[None, :]
    if MASKED:
        return tl.load(at, mask=(start + offset < stop)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _attend(
    acc, total, highest, q, i, key, value, until, index, begin, stop, before, T, kt, vt, scale,
    P: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with key blocks begin to stop of a list.

    An entry is read one block ahead, or else Triton would spend one of the stages of its pipeline on the list.
    """
    o, p = tl.arange(0, N), tl.arange(0, P)
    start = tl.load(index + begin, mask=begin < stop, other=0) * N
    for j in range(begin, stop):
        k = _tile(key, start, o, p, kt, T, P, MASKED)
        s = tl.dot(q, k.trans(), input_precision=PRECISION)
        if MASKED:
            c = (start + o)[None, :]
            end = tl.load(until + c, mask=c < T, other=0)
            x = _masked(s * scale, i, c, before, end)
            new = tl.maximum(highest, tl.max(x, 1))
            # Of a query that has seen nothing yet, -inf - -inf would be NaN.
            base = tl.where(new == float("-inf"), 0.0, new)
            e = tl.exp2(x - base[:, None])
        else:  # the same with a multiplication less
            new = tl.maximum(highest, tl.max(s, 1) * scale)
            base = new
            e = tl.exp2(s * scale - base[:, None])
        keep = tl.exp2(highest - base)
        v = _tile(value, start, o, p, vt, T, P, MASKED)
        acc = tl.dot(e.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        total = total * keep + tl.sum(e, 1)
        highest = new
        start = tl.load(index + tl.minimum(j + 1, stop - 1)) * N
    return acc, total, highest


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    query, key, value, until, index, count, out, score, n, T, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, ub, uh, xb, xh, columns,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most: they begin first
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    head = h // GROUPS
    first = block * M
    o, p = tl.arange(0, M), tl.arange(0, P)
    i = (first + o)[:, None]
    q = _tile(query + b * qb + h * qh, first, o, p, qt, n, P, True)
    key += b * kb + head * kh
    value += b * vb + head * vh
    until += b * ub + head * uh
    at = b * xb + head * xh + block
    whole, some = tl.load(count + at * 2), tl.load(count + at * 2 + 1)
    index += at * columns
    before = T - n
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, P], tl.float32)
    acc, total, highest = _attend(
        acc, total, highest, q, i, key, value, until, index, 0, whole, before, T, kt, vt, scale,
        P, N, False, PRECISION,
    )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q, i, key, value, until, index, whole, some, before, T, kt, vt,
        scale, P, N, True, PRECISION,
    )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    real = first + o < n
    to = out + b * ob + h * oh + first.to(tl.int64) * ot + o[:, None] * ot + p[None, :]
    tl.store(to, acc / safe[:, None], mask=real[:, None])
    # Infinite where nothing is seen: the backward pass then finds weights of zero.
    tl.store(score + row * n + first + o, tl.where(total == 0.0, float("inf"), highest + tl.log2(safe)), mask=real)


def by_rows(x: Tensor) -> Tensor:
    """x (B, H, T, P) with neighbouring features side by side, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of the rows, heads and tokens of some (B, H, T, P)."""
    return [x.stride(d) for x in tensors for d in range(3)]


def span_arguments(columns: Columns, lists: Blocks) -> tuple[list[Tensor], list[int]]:
    """The kernels' arguments until, index and count; strides of their rows and heads, and the number of columns."""
    until = columns.until.contiguous()
    broadcast = [*_broadcast(until.shape), *_broadcast(lists.index.shape[:3])]
    return [until, lists.index, lists.count], [*broadcast, lists.index.shape[-1]]


def _broadcast(shape: torch.Size) -> tuple[int, int]:
    """Strides of rows and heads of a contiguous (B or 1, Hkv or 1, numbers), 0 where one serves all."""
    rows, heads, numbers = shape
    return heads * numbers if rows > 1 else 0, numbers if heads > 1 else 0


def sizes(query: Tensor, key: Tensor, tile: Tiles) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "HEADS": query.shape[1], "GROUPS": query.shape[1] // key.shape[1], "P": query.shape[-1],
        "M": tile.queries, "N": tile.keys,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def forward(query: Tensor, key: Tensor, value: Tensor, columns: Columns, scaling: float) -> tuple[Tensor, Tensor]:
    """See `ahn.attend.spans.attend`: (B, Hq, n, P), and (B, Hq, n) the `score` that the backward pass needs."""
    B, HEADS, n, P = query.shape
    tile = tiles("forward", query)
    spans, span_strides = span_arguments(columns, columns.lists(tile))
    query, key, value = by_rows(query), by_rows(key), by_rows(value)
    out = torch.empty(B, n, HEADS, P, dtype=query.dtype, device=query.device).transpose(1, 2)
    score = torch.empty(B, HEADS, n, dtype=torch.float32, device=query.device)
    _forward[triton.cdiv(n, tile.queries), B * HEADS](
        query, key, value, *spans, out, score, n, key.shape[2], scaling * LOG2E.value,
        *strides(query, key, value, out), *span_strides, **sizes(query, key, tile),
    )  # fmt: skip
    return out, score

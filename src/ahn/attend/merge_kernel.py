"""`ahn.attend.merge.merge` in one Triton kernel: every part is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.attend.part import Part

ROWS = 16


@triton.jit
def _scores(score, i, count, TURNED: tl.constexpr):
    at = count - 1 - i if TURNED else i
    return tl.load(score + at, mask=i < count, other=-float("inf"))


@triton.jit
def _rows(x, i, count, step, p, P, TURNED: tl.constexpr):
    at = (count - 1 - i if TURNED else i).to(tl.int64)
    inside = (i < count)[:, None] & (p < P)[None, :]
    return tl.load(x + at[:, None] * step + p[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _merge(
    out, a, b, c, score_a, score_b, score_c, n, count_b, count_c, heads,
    ab, ah, an, bb, bh, bn, cb, ch, cn, sab, sah, sbb, sbh, scb, sch,
    REVERSED_A: tl.constexpr, REVERSED_B: tl.constexpr, REVERSED_C: tl.constexpr, THREE: tl.constexpr,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, WIDTH)
    sa = _scores(score_a + row * sab + head * sah, i, n, REVERSED_A)
    sb = _scores(score_b + row * sbb + head * sbh, i, count_b, REVERSED_B)
    sa = tl.where(i < n, sa, 0.0)
    highest = tl.maximum(sa, sb)
    if THREE:
        sc = _scores(score_c + row * scb + head * sch, i, count_c, REVERSED_C)
        highest = tl.maximum(highest, sc)
    ea, eb = tl.exp(sa - highest), tl.exp(sb - highest)
    x = _rows(a + row * ab + head * ah, i, n, an, p, P, REVERSED_A) * ea[:, None]
    x += _rows(b + row * bb + head * bh, i, count_b, bn, p, P, REVERSED_B) * eb[:, None]
    total = ea + eb
    if THREE:
        ec = tl.exp(sc - highest)
        x += _rows(c + row * cb + head * ch, i, count_c, cn, p, P, REVERSED_C) * ec[:, None]
        total += ec
    to = ((row * n + i)[:, None] * heads + head) * P + p[None, :]
    tl.store(out + to, x / total[:, None], mask=(i < n)[:, None] & (p < P)[None, :])


def merge(parts: list[Part]) -> Tensor:
    """See `ahn.attend.merge.merge`; two or three parts."""
    a, b, c = parts if len(parts) == 3 else (*parts, parts[-1])
    B, H, n, P = a.out.shape
    out = torch.empty(B, n, H, P, dtype=a.out.dtype, device=a.out.device)
    _merge[triton.cdiv(n, ROWS), B * H](
        out, a.out, b.out, c.out, a.score, b.score, c.score, n, b.out.shape[2], c.out.shape[2], H,
        *a.out.stride()[:3], *b.out.stride()[:3], *c.out.stride()[:3],
        *a.score.stride()[:2], *b.score.stride()[:2], *c.score.stride()[:2],
        REVERSED_A=a.reversed, REVERSED_B=b.reversed, REVERSED_C=c.reversed, THREE=len(parts) == 3,
        P=P, WIDTH=triton.next_power_of_2(P), BLOCK=ROWS,
    )  # fmt: skip
    return out.transpose(1, 2)

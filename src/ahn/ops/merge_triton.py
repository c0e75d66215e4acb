"""`ahn.ops.merge.merge` in one Triton kernel: every part is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.merge import Part

ROWS = 16


@triton.jit
def _weights(score, at, turned_at, valid, TURNED: tl.constexpr):
    return tl.load(score + (turned_at if TURNED else at), mask=valid, other=0.0)


@triton.jit
def _merge(
    out, a, b, c, score_a, score_b, score_c, n, heads,
    ab, ah, an, bb, bh, bn, cb, ch, cn,
    TURNED_A: tl.constexpr, TURNED_B: tl.constexpr, TURNED_C: tl.constexpr, THREE: tl.constexpr,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, WIDTH)
    valid = i < n
    both = valid[:, None] & (p < P)[None, :]
    at, turned = tl.program_id(1) * n + i, tl.program_id(1) * n + n - 1 - i
    sa = _weights(score_a, at, turned, valid, TURNED_A)
    sb = _weights(score_b, at, turned, valid, TURNED_B)
    highest = tl.maximum(sa, sb)
    if THREE:
        sc = _weights(score_c, at, turned, valid, TURNED_C)
        highest = tl.maximum(highest, sc)
    ea, eb = tl.exp(sa - highest), tl.exp(sb - highest)
    row = row.to(tl.int64)
    ia = (n - 1 - i if TURNED_A else i).to(tl.int64)
    ib = (n - 1 - i if TURNED_B else i).to(tl.int64)
    xa = tl.load(a + row * ab + head * ah + ia[:, None] * an + p[None, :], mask=both, other=0.0).to(tl.float32)
    xb = tl.load(b + row * bb + head * bh + ib[:, None] * bn + p[None, :], mask=both, other=0.0).to(tl.float32)
    x, total = xa * ea[:, None] + xb * eb[:, None], ea + eb
    if THREE:
        ec = tl.exp(sc - highest)
        ic = (n - 1 - i if TURNED_C else i).to(tl.int64)
        xc = tl.load(c + row * cb + head * ch + ic[:, None] * cn + p[None, :], mask=both, other=0.0).to(tl.float32)
        x, total = x + xc * ec[:, None], total + ec
    to = ((row * n + i)[:, None] * heads + head) * P + p[None, :]
    tl.store(out + to, x / total[:, None], mask=both)


def merge(parts: list[Part]) -> Tensor:
    """See `ahn.ops.merge.merge`; two or three parts."""
    a, b, c = parts if len(parts) == 3 else (*parts, parts[-1])
    B, H, n, P = a.out.shape
    out = torch.empty(B, n, H, P, dtype=a.out.dtype, device=a.out.device)
    _merge[triton.cdiv(n, ROWS), B * H](
        out, a.out, b.out, c.out, *(x.score.contiguous() for x in (a, b, c)), n, H,
        *a.out.stride()[:3], *b.out.stride()[:3], *c.out.stride()[:3],
        TURNED_A=a.turned, TURNED_B=b.turned, TURNED_C=c.turned, THREE=len(parts) == 3,
        P=P, WIDTH=triton.next_power_of_2(P), BLOCK=ROWS,
    )  # fmt: skip
    return out.transpose(1, 2)

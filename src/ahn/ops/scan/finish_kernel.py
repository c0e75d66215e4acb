"""Finish the raw reads of a scan and add them to exact attention, with gradients: one kernel each way.

Where the norm goes across heads, or a router weighs the reads, norm and gate are a kernel of their own, and projection
and sum are torch's. What autograd would keep of norm and gate, five tensors in float32, is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.rule import StepRead, StepRule

PROGRAMS = 512
"""Programs of a backward kernel, each of which sums its tokens' gradients of the weights."""
LENGTHS = ("n", "tokens", "tiles")
"""Arguments that change with the lengths of a batch: new values must not make Triton compile again."""
TILE = 64
"""Tokens that a program projects at once."""


@triton.jit
def _normed(o, gamma, norm, row, tokens, ob, oh, ot, gb, gh, gt, eps,
            HEADS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """Of one token, rows for heads: raw read, gate before and after its activation, the norm's factor and weight."""
    b, t = row // tokens, row % tokens
    h, p = tl.arange(0, ROWS)[:, None], tl.arange(0, P)[None, :]
    x = tl.load(o + b * ob + h * oh + t * ot + p, mask=h < HEADS, other=0.0).to(tl.float32)
    gate = tl.load(gamma + b * gb + h * gh + t * gt, mask=h < HEADS, other=0.0).to(tl.float32)
    silu = gate * tl.sigmoid(gate)
    if ACROSS:
        w = tl.load(norm + h * P + p, mask=h < HEADS, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(tl.sum(x * x * silu * silu, 1), 0) / (HEADS * P) + eps)
    else:
        w = tl.load(norm + p).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, 1)[:, None] / P + eps)
    return x, gate, silu, factor, w


@triton.jit
def _finish(
    o, gamma, norm, out, tokens, ob, oh, ot, gb, gh, gt, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x, _, silu, factor, w = _normed(
        o, gamma, norm, row, tokens, ob, oh, ot, gb, gh, gt, eps, HEADS, ROWS, P, ACROSS
    )  # fmt: skip
    h, p = tl.arange(0, ROWS)[:, None], tl.arange(0, P)[None, :]
    tl.store(out + (row * HEADS + h) * P + p, x * factor * w * silu, mask=h < HEADS)


@triton.jit
def _finish_backward(
    o, gamma, norm, grad, grad_o, grad_gamma, grad_norm, rows, tokens,
    ob, oh, ot, gb, gh, gt, db, dh, dt, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Gradients of raw reads and gates, (B, m, Hq, P) and (B, m, Hq), and this program's part of the weight's."""
    h, p = tl.arange(0, ROWS)[:, None], tl.arange(0, P)[None, :]
    held = h < HEADS
    dw = tl.zeros([ROWS, P], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x, gate, silu, factor, w = _normed(
            o, gamma, norm, row, tokens, ob, oh, ot, gb, gh, gt, eps, HEADS, ROWS, P, ACROSS
        )  # fmt: skip
        dy = tl.load(grad + row // tokens * db + h * dh + row % tokens * dt + p, mask=held, other=0.0).to(tl.float32)
        if ACROSS:
            unit = x * silu * factor
            dw += dy * unit
            dy *= w
            dy = (dy - unit * (tl.sum(tl.sum(dy * unit, 1), 0) / (HEADS * P))) * factor
            ds = tl.sum(dy * x, 1)[:, None]
            dx = dy * silu
        else:
            unit = x * factor
            dw += dy * unit * silu
            dy *= w
            ds = tl.sum(dy * unit, 1)[:, None]
            dx = (dy - unit * (ds / P)) * (factor * silu)
        open_ = tl.sigmoid(gate)
        to = row * HEADS + h
        tl.store(grad_gamma + to, ds * open_ * (1 + gate * (1 - open_)), mask=held)
        tl.store(grad_o + to * P + p, dx, mask=held)
    if ACROSS:
        tl.store(grad_norm + (tl.program_id(0) * HEADS + h) * P + p, dw, mask=held)
    else:
        tl.store(grad_norm + tl.program_id(0) * P + tl.arange(0, P), tl.sum(dw, 0))


@triton.jit
def _normed_tile(o, gamma, norm, t, real, ot, gt, eps, P: tl.constexpr):
    """Of tokens t of one head: raw reads through the norm without its weight, gates, the norm's factor and weight."""
    p = tl.arange(0, P)
    x = tl.load(o + t[:, None] * ot + p[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    gate = tl.load(gamma + t * gt, mask=real, other=0.0).to(tl.float32)[:, None]
    factor = tl.rsqrt(tl.sum(x * x, 1) / P + eps)[:, None]
    return x * factor, gate, factor, tl.load(norm + p).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=LENGTHS)
def _add_read(
    exact, o, gamma, norm, o_proj, out, n, tokens, eb, eh, et, ob, oh, ot, gb, gh, gt, eps,
    HEADS: tl.constexpr, P: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Exact attention (B, n, Hq, P) of some tokens of a head, and of the last ones of n what the memory reads."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    i, p = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, P)
    t = i - (n - tokens)
    real = (t >= 0) & (i < n)
    unit, gate, _, w = _normed_tile(o + b * ob + h * oh, gamma + b * gb + h * gh, norm, t, real, ot, gt, eps, P)
    dtype = o.dtype.element_ty
    projection = tl.load(o_proj + h * P * P + p[:, None] * P + p[None, :]).to(dtype)
    read = tl.dot((unit * w * gate * tl.sigmoid(gate)).to(dtype), projection, input_precision=PRECISION).to(dtype)
    seen = tl.load(exact + b * eb + h * eh + i[:, None] * et + p[None, :], mask=(i < n)[:, None], other=0.0)
    to = ((b * n + i)[:, None] * HEADS + h) * P + p[None, :]
    tl.store(out + to, seen.to(tl.float32) + read.to(tl.float32), mask=(i < n)[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def _add_read_backward(
    grad, o, gamma, norm, o_proj, grad_o, grad_gamma, grad_norm, grad_proj, tiles, n, tokens,
    db, dh, dt, ob, oh, ot, gb, gh, gt, eps,
    HEADS: tl.constexpr, P: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of raw reads and gates, (B, m, Hq, P) and (B, m, Hq), and this program's parts of the weights'."""
    h, p = tl.program_id(1).to(tl.int64), tl.arange(0, P)
    square = p[:, None] * P + p[None, :]
    dtype = o.dtype.element_ty
    projection = tl.load(o_proj + h * P * P + square).to(dtype)
    dw, dp = tl.zeros([P], tl.float32), tl.zeros([P, P], tl.float32)
    of_row = tl.cdiv(tokens, C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        b = (tile // of_row).to(tl.int64)
        t = tile % of_row * C + tl.arange(0, C)
        real = t < tokens
        unit, gate, factor, w = _normed_tile(
            o + b * ob + h * oh, gamma + b * gb + h * gh, norm, t, real, ot, gt, eps, P
        )  # fmt: skip
        at = grad + b * db + h * dh + (n - tokens + t)[:, None] * dt + p[None, :]
        dread = tl.load(at, mask=real[:, None], other=0.0).to(dtype)
        opened = tl.sigmoid(gate)
        silu = gate * opened
        dp = tl.dot(tl.trans((unit * w * silu).to(dtype)), dread, dp, input_precision=PRECISION)
        dy = tl.dot(dread, tl.trans(projection), input_precision=PRECISION)
        dw += tl.sum(dy * unit * silu, 0)
        dy *= w
        ds = tl.sum(dy * unit, 1)[:, None]
        to = ((b * tokens + t) * HEADS + h)[:, None]
        tl.store(grad_gamma + to, ds * opened * (1 + gate * (1 - opened)), mask=real[:, None])
        tl.store(grad_o + to * P + p[None, :], (dy - unit * (ds / P)) * (factor * silu), mask=real[:, None])
    own = tl.program_id(0) * HEADS + h
    tl.store(grad_norm + own * P + p, dw)
    tl.store(grad_proj + own * P * P + square, dp)


class AddedRead(torch.autograd.Function):
    """Exact attention (B, n, Hq, P) with the reads, from raw ones (B, Hq, m, P), γ (B, Hq, m) and the two weights."""

    @staticmethod
    def forward(
        ctx: Any, exact: Tensor, o: Tensor, gamma: Tensor, norm: Tensor, o_proj: Tensor, rule: StepRule
    ) -> Tensor:
        B, HEADS, tokens, P = o.shape
        n = exact.shape[1]
        ctx.save_for_backward(o, gamma, norm, o_proj)
        ctx.n, ctx.eps = n, rule.norm_eps
        out = torch.empty(B, n, HEADS, P, dtype=exact.dtype, device=exact.device)
        exact = exact if exact.stride(-1) == 1 else exact.contiguous()
        eb, et, eh = exact.stride()[:3]
        _add_read[triton.cdiv(n, TILE), B * HEADS](
            exact, o, gamma, norm, o_proj.contiguous(), out, n, tokens, eb, eh, et, *o.stride()[:3], *gamma.stride(),
            rule.norm_eps, **_sizes(o),
        )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        o, gamma, norm, o_proj = ctx.saved_tensors
        B, HEADS, tokens, P = o.shape
        by_rows = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_o = torch.empty(B, tokens, HEADS, P, dtype=o.dtype, device=o.device)
        grad_gamma = torch.empty(B, tokens, HEADS, dtype=gamma.dtype, device=o.device)
        tiles = B * triton.cdiv(tokens, TILE)
        programs = min(triton.cdiv(PROGRAMS, HEADS), tiles)
        grad_norm = torch.empty(programs, HEADS, P, dtype=torch.float32, device=o.device)
        grad_proj = torch.empty(programs, HEADS, P, P, dtype=torch.float32, device=o.device)
        db, dt, dh = by_rows.stride()[:3]
        _add_read_backward[programs, HEADS](
            by_rows, o, gamma, norm, o_proj.contiguous(), grad_o, grad_gamma, grad_norm, grad_proj, tiles, ctx.n,
            tokens, db, dh, dt, *o.stride()[:3], *gamma.stride(), ctx.eps, **_sizes(o),
        )  # fmt: skip
        of_weights = grad_norm.sum((0, 1)).to(norm.dtype), grad_proj.sum(0).to(o_proj.dtype)
        return grad, grad_o.transpose(1, 2), grad_gamma.transpose(1, 2), *of_weights, None


def _sizes(o: Tensor) -> dict[str, Any]:
    """What both kernels are compiled for."""
    HEADS, P = o.shape[1], o.shape[3]
    precision = "ieee" if o.dtype == torch.float32 else "tf32"
    # With a third stage heads of 128 need 114 KB of shared memory backwards, and GPUs for one user have 99.
    settings = {"num_warps": 8 if P > 64 else 4, "num_stages": 2}
    return {"HEADS": HEADS, "P": P, "C": TILE, "PRECISION": precision} | settings


class NormAndGate(torch.autograd.Function):
    """(raw reads (B, Hq, m, P), γ (B, Hq, m), weight of the norm, rule) to what is projected, in the reads' type."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, gamma: Tensor, norm: Tensor, rule: StepRule) -> Tensor:
        B, HEADS, tokens, P = o.shape
        ctx.save_for_backward(o, gamma, norm)
        ctx.rule = rule
        out = torch.empty(B, tokens, HEADS, P, dtype=o.dtype, device=o.device)
        _finish[(B * tokens,)](
            o, gamma, norm, out, tokens, *o.stride()[:3], *gamma.stride(), rule.norm_eps,
            HEADS=HEADS, ROWS=triton.next_power_of_2(HEADS), P=P, ACROSS=rule.across_heads, num_warps=4,
        )  # fmt: skip
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        o, gamma, norm = ctx.saved_tensors
        B, HEADS, tokens, P = o.shape
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_o = torch.empty(B, tokens, HEADS, P, dtype=o.dtype, device=o.device)
        grad_gamma = torch.empty(B, tokens, HEADS, dtype=gamma.dtype, device=o.device)
        programs = min(PROGRAMS, B * tokens)
        grad_norm = torch.empty(programs, norm.shape[0], dtype=torch.float32, device=o.device)
        _finish_backward[(programs,)](
            o, gamma, norm, grad, grad_o, grad_gamma, grad_norm, B * tokens, tokens,
            *o.stride()[:3], *gamma.stride(), *grad.stride()[:3], ctx.rule.norm_eps,
            HEADS=HEADS, ROWS=triton.next_power_of_2(HEADS), P=P, ACROSS=ctx.rule.across_heads, num_warps=8,
        )  # fmt: skip
        return grad_o.transpose(1, 2), grad_gamma.transpose(1, 2), grad_norm.sum(0).to(norm.dtype), None


def adds(rule: StepRule, read: StepRead) -> bool:
    """Whether `AddedRead` can do this: the norm is each head's own, and no router weighs the read."""
    return read.weight is None and not rule.across_heads


def finish(o: Tensor, rule: StepRule, read: StepRead) -> Tensor:
    """Norm, gate, projection and the router's weight of raw reads o (B, Hq, m, P), in o's type and shape.

    `read.gamma` is (B, Hq, m), `read.weight` (B or 1, Hq, m); `read.query` is not used.
    """
    projected = NormAndGate.apply(o, read.gamma, read.norm, rule) @ read.o_proj.to(o.dtype)
    return projected if read.weight is None else (projected * read.weight.unsqueeze(-1)).to(o.dtype)

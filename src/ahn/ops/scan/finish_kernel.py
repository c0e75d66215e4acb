"""Finish the raw reads of a scan, with gradients: norm and gate in one kernel each way, then a projection per head.

What autograd would keep of norm and gate, five tensors in float32, is computed again from the raw read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.rule import StepRead, StepRule

PROGRAMS = 512
"""Programs of the backward kernel, each of which sums its tokens' gradients of the norm's weight."""


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


def finish(o: Tensor, rule: StepRule, read: StepRead) -> Tensor:
    """Norm, gate, projection and the router's weight of raw reads o (B, Hq, m, P), in o's type and shape.

    `read.gamma` is (B, Hq, m), `read.weight` (B or 1, Hq, m); `read.query` is not used.
    """
    projected = NormAndGate.apply(o, read.gamma, read.norm, rule) @ read.o_proj.to(o.dtype)
    return projected if read.weight is None else (projected * read.weight.unsqueeze(-1)).to(o.dtype)

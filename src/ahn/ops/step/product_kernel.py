"""`ahn.ops.step.product.product` in Triton: a few rows a program, many programs in flight, weights before all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.step import dependent_launch
from ahn.ops.step.dependent_launch import announce, wait


class Tile(NamedTuple):
    """What a program holds of each matrix at once.

    Attributes:
        rows, features: of weights.
        warps: that work on it.
        registers: most of a thread; None for as many as the compiler likes.
    """

    rows: int
    features: int
    warps: int
    registers: int | None


def tile(K: int, silu: bool) -> Tile:
    """For rows of K features; measured on H100s and an H200 with layers of Qwen2.5-3B, -7B, -14B and Qwen3-4B."""
    whole = triton.next_power_of_2(K)
    if silu:  # two sums at once leave no registers for a loop: whole rows as long as they fit
        features = min(8192, whole)
        return Tile(min(4, 8192 // features), features, 8, None)
    # With 64 registers per thread a multiprocessor holds four programs.
    return Tile(4, whole, 4, None) if whole <= 2048 else Tile(4, 1024, 8, 64)


@triton.jit
def load_weights(matrix, real, inside):
    """Rows by features. Read once per step, they are the first to leave the L2 cache again: others keep their place."""
    return tl.load(matrix, mask=real[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _vector(x, f, features, COPIES: tl.constexpr):
    """Numbers of x in float32, (COPIES, numbers)."""
    at = f[None, :] + tl.zeros([COPIES, 1], tl.int32)
    return tl.load(x + at, mask=at < features, other=0.0).to(tl.float32)


@triton.jit
def place(block, weights, biases, rows, COUNT: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr):
    """Which matrix, and which of its rows: blocks of rows are counted through all matrices.

    Returns its weights, its bias, how many rows have one, its rows, those of matrices before it, and the block in it.
    """
    # `biased` is the number of rows with a bias, all or none (a bit of BIASED for each matrix).
    weight, bias, biased, count, first, local = weights[0], biases[0], (BIASED & 1) * rows[0], rows[0], 0, block
    blocks_before, rows_before = 0, 0
    for i in tl.static_range(1, COUNT):
        blocks_before += tl.cdiv(rows[i - 1], ROWS)
        rows_before += rows[i - 1]
        here = block >= blocks_before
        weight, bias = tl.where(here, weights[i], weight), tl.where(here, biases[i], bias)
        biased = tl.where(here, (BIASED >> i & 1) * rows[i], biased)
        count, first = tl.where(here, rows[i], count), tl.where(here, rows_before, first)
        local = tl.where(here, block - blocks_before, local)
    return weight, bias, biased, count, first, local


@triton.jit
def _product(
    x, weights, biases, rows, norm, residual, out, features, eps,
    COUNT: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    block = tl.program_id(0)
    weight, bias, biased, count, first, local = place(block, weights, biases, rows, 1 if SILU else COUNT, BIASED, ROWS)
    # In a loop, the next round's weights are on their way while these are added up, and every thread has its own copy
    # of x, whose exchange would hold up every round; a second matrix or a norm leaves no registers for that.
    AHEAD: tl.constexpr = LOOP and not (SILU or NORM)
    COPIES: tl.constexpr = ROWS if AHEAD else 1
    n = local * ROWS + tl.arange(0, ROWS)
    real = n < count
    f = tl.arange(0, FEATURES)
    at = n.to(tl.int64)[:, None] * features + f[None, :]
    w = load_weights(weight + at, real, f < features)
    if SILU:
        u = load_weights(weights[1] + at, real, f < features)
        bias_u = tl.load(biases[1] + n, mask=n < (BIASED >> 1 & 1) * rows[0], other=0.0)
    if AHEAD:
        w_next = load_weights(weight + at + FEATURES, real, f < features - FEATURES)
    b = tl.load(bias + n, mask=n < biased, other=0.0)
    if NORM:
        scale = tl.load(norm + f, mask=f < features, other=0.0)
    wait(PDL)

    v = _vector(x, f, features, COPIES)
    if RESIDUAL:  # on its way with x: a load that begins after the sums is time that nothing hides
        y_before = tl.load(residual + first + n, mask=real, other=0.0)
    squares = v * v
    if NORM:  # the norm's factor is the same for all features and comes last
        v *= scale.to(tl.float32)[None, :]
    acc = w.to(tl.float32) * v
    if SILU:
        acc_u = u.to(tl.float32) * v
    if LOOP:
        for start in range(FEATURES, features, FEATURES):
            if AHEAD:
                w, later = w_next, start + FEATURES
                w_next = load_weights(weight + at + later, real, f < features - later)
            else:
                w = load_weights(weight + at + start, real, f < features - start)
            if SILU:
                u = load_weights(weights[1] + at + start, real, f < features - start)
            v = _vector(x, start + f, features, COPIES)
            squares += v * v
            if NORM:
                v *= tl.load(norm + start + f, mask=f < features - start, other=0.0).to(tl.float32)[None, :]
            acc += w.to(tl.float32) * v
            if SILU:
                acc_u += u.to(tl.float32) * v
    y = tl.sum(acc, 1)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / features + eps)
    y = y * factor + b.to(tl.float32)
    if SILU:
        y = y * tl.sigmoid(y) * (tl.sum(acc_u, 1) * factor + bias_u.to(tl.float32))
    if RESIDUAL:
        y += y_before.to(tl.float32)
    tl.store(out + first + n, y, mask=real)


def product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    """See `ahn.ops.step.product.product`."""
    K = weights[0].shape[1]
    counts = tuple(weight.shape[0] for weight in weights)
    ROWS, features, warps, registers = tile(K, silu)
    held = tuple(weight.contiguous() for weight in weights)
    out = torch.empty(counts[0] if silu else sum(counts), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(counts[0], ROWS) if silu else sum(triton.cdiv(count, ROWS) for count in counts)
    # Where there is no bias, a pointer that is never read.
    given = tuple(own if bias is None else bias for own, bias in zip(held, biases, strict=True))
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    launch = dependent_launch.options(x)
    if launch["PDL"] and registers is not None:
        launch["maxnreg"] = registers
    _product[blocks,](
        x.contiguous(), held, given, counts, norm, None if residual is None else residual.contiguous(), out, K, eps,
        COUNT=len(counts), BIASED=biased, NORM=norm is not None, SILU=silu, RESIDUAL=residual is not None,
        ROWS=ROWS, FEATURES=features, LOOP=features < K, num_warps=warps, **launch,
    )  # fmt: skip
    return out

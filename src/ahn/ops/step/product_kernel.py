"""`ahn.ops.step.product.product` in Triton: a few rows a program, many programs in flight, weights before all else.

Of several vectors tensor cores make the sums, which for one would be sixteen times too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.step import dependent_launch
from ahn.ops.step.dependent_launch import announce, prefetch, wait


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
def _weights(matrix, real, inside):
    """Rows by features. Read once per step, they are the first to leave the L2 cache again: others keep their place."""
    return tl.load(matrix, mask=real[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _vector(x, f, features, COPIES: tl.constexpr):
    """Numbers of x in float32, (COPIES, numbers)."""
    at = f[None, :] + tl.zeros([COPIES, 1], tl.int32)
    return tl.load(x + at, mask=at < features, other=0.0).to(tl.float32)


@triton.jit
def _place(block, weights, biases, rows, COUNT: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr):
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
    weight, bias, biased, count, first, local = _place(block, weights, biases, rows, 1 if SILU else COUNT, BIASED, ROWS)
    # In a loop, the next round's weights are on their way while these are added up, and every thread has its own copy
    # of x, whose exchange would hold up every round; a second matrix or a norm leaves no registers for that.
    AHEAD: tl.constexpr = LOOP and not (SILU or NORM)
    COPIES: tl.constexpr = ROWS if AHEAD else 1
    n = local * ROWS + tl.arange(0, ROWS)
    real = n < count
    f = tl.arange(0, FEATURES)
    at = n.to(tl.int64)[:, None] * features + f[None, :]
    w = _weights(weight + at, real, f < features)
    if SILU:
        u = _weights(weights[1] + at, real, f < features)
        bias_u = tl.load(biases[1] + n, mask=n < (BIASED >> 1 & 1) * rows[0], other=0.0)
    if AHEAD:
        w_next = _weights(weight + at + FEATURES, real, f < features - FEATURES)
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
                w_next = _weights(weight + at + later, real, f < features - later)
            else:
                w = _weights(weight + at + start, real, f < features - start)
            if SILU:
                u = _weights(weights[1] + at + start, real, f < features - start)
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
    """See `ahn.ops.step.product.product`, of one vector."""
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


@triton.jit
def _products(
    x, weights, biases, rows, norm, residual, out, features, total, vectors, eps,
    COUNT: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    VECTORS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, LINE: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    block = tl.program_id(0)
    weight, bias, biased, count, first, local = _place(block, weights, biases, rows, 1 if SILU else COUNT, BIASED, ROWS)
    n, m, f = local * ROWS + tl.arange(0, ROWS), tl.arange(0, VECTORS), tl.arange(0, FEATURES)
    real, there = n < count, m < vectors
    at = n.to(tl.int64)[:, None] * features + f[None, :]
    # What no kernel writes may be on its way before the one before has ended; of the loop's first round.
    line = tl.minimum(n, count - 1).to(tl.int64)[:, None] * features
    line += tl.minimum(tl.arange(0, FEATURES // LINE) * LINE, features - 1)[None, :]
    prefetch(weight + line, PDL)
    if SILU:
        prefetch(weights[1] + line, PDL)
    b = tl.load(bias + n, mask=n < biased, other=0.0)
    wait(PDL)
    acc, squares = tl.zeros([VECTORS, ROWS], tl.float32), tl.zeros([VECTORS], tl.float32)
    acc_u = tl.zeros([VECTORS, ROWS], tl.float32)
    for start in range(0, features, FEATURES):
        inside = f < features - start
        w = _weights(weight + at + start, real, inside)
        own = m[:, None] * features + start + f[None, :]
        v = tl.load(x + own, mask=there[:, None] & inside[None, :], other=0.0)
        if NORM:  # the norm's factor is the same for all features and comes last
            wide = v.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            v = (wide * tl.load(norm + start + f, mask=inside, other=0.0).to(tl.float32)[None, :]).to(v.dtype)
        acc = tl.dot(v, tl.trans(w), acc, input_precision=PRECISION)
        if SILU:
            u = _weights(weights[1] + at + start, real, inside)
            acc_u = tl.dot(v, tl.trans(u), acc_u, input_precision=PRECISION)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(squares / features + eps)[:, None]
    y = acc * factor + b.to(tl.float32)[None, :]
    if SILU:
        b_u = tl.load(biases[1] + n, mask=n < (BIASED >> 1 & 1) * rows[0], other=0.0)
        y = y * tl.sigmoid(y) * (acc_u * factor + b_u.to(tl.float32)[None, :])
    to, mine = m[:, None] * total + (first + n)[None, :], there[:, None] & real[None, :]
    if RESIDUAL:
        y += tl.load(residual + to, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + to, y, mask=mine)


def products(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
    features: int = 0,
) -> Tensor:
    """See `ahn.ops.step.product.product`, of several vectors; `features` are of a round, 0 for as many as suit."""
    K, ROWS = weights[0].shape[1], 16
    vectors, counts = x.numel() // K, tuple(weight.shape[0] for weight in weights)
    total = counts[0] if silu else sum(counts)
    # Of matrices like the last two of a layer there is one program for each multiprocessor: 48 KB of weights are under
    # way in each. A norm's weights leave no registers for rounds as long; of two matrices there are several programs.
    most, stages = (256, 3) if silu else (512, 4) if norm is None else (256, 5)
    features = features or min(triton.next_power_of_2(K), most * 2 // x.element_size())
    held = tuple(weight.contiguous() for weight in weights)
    out = torch.empty(vectors, total, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(counts[0], ROWS) if silu else sum(triton.cdiv(count, ROWS) for count in counts)
    given = tuple(own if bias is None else bias for own, bias in zip(held, biases, strict=True))
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    _products[blocks,](
        x.contiguous(), held, given, counts, norm, None if residual is None else residual.contiguous(), out,
        K, total, vectors, eps,
        COUNT=len(counts), BIASED=biased, NORM=norm is not None, SILU=silu, RESIDUAL=residual is not None,
        VECTORS=max(16, triton.next_power_of_2(vectors)), ROWS=ROWS, FEATURES=features,
        LINE=min(features, 128 // x.element_size()), PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=stages, **dependent_launch.options(x),
    )  # fmt: skip
    return out

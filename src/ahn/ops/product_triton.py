"""`ahn.ops.product.product` in Triton: a few rows a program, many programs in flight, weights before anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops import dependent
from ahn.ops.dependent import announce, prefetch, wait

WARPS = 8
LINE_BYTES = 128
AHEAD = 264  # each of so many programs asks for what the one that far on will read; an H100 holds twice as many


class Tile(NamedTuple):
    """What a program holds of each matrix at once.

    Attributes:
        rows, features: of weights.
        registers: most of a thread; None for as many as the compiler likes.
    """

    rows: int
    features: int
    registers: int | None


def tile(K: int, silu: bool) -> Tile:
    """For rows of K features; measured on an H100 with layers of Qwen2.5-3B, -7B, -14B and Qwen3-4B."""
    whole = triton.next_power_of_2(K)
    if silu:  # two sums at once leave no registers for a loop: whole rows as long as they fit
        features = min(8192, whole)
        return Tile(min(4, 8192 // features), features, None)
    # With 64 registers a thread a multiprocessor holds four programs.
    return Tile(4, whole, None) if whole <= 2048 else Tile(4, 1024, 64)


@triton.jit
def _product(
    x, weights, biases, rows, norm, residual, out, features, eps,
    COUNT: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, LOOP: tl.constexpr, AHEAD: tl.constexpr, LINE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    block = tl.program_id(0)
    # Which matrix, and which of its rows: blocks of rows are counted through all matrices. `biased` is the number of
    # rows with a bias, all or none (a bit of BIASED for each matrix).
    weight, bias, biased, count, first, local = weights[0], biases[0], (BIASED & 1) * rows[0], rows[0], 0, block
    if not SILU:
        blocks_before, rows_before = 0, 0
        for i in tl.static_range(1, COUNT):
            blocks_before += tl.cdiv(rows[i - 1], ROWS)
            rows_before += rows[i - 1]
            here = block >= blocks_before
            weight, bias = tl.where(here, weights[i], weight), tl.where(here, biases[i], bias)
            biased = tl.where(here, (BIASED >> i & 1) * rows[i], biased)
            count, first = tl.where(here, rows[i], count), tl.where(here, rows_before, first)
            local = tl.where(here, block - blocks_before, local)
    n = local * ROWS + tl.arange(0, ROWS)
    real = n < count
    f = tl.arange(0, FEATURES)
    at = n.to(tl.int64)[:, None] * features + f[None, :]
    w = tl.load(weight + at, mask=real[:, None] & (f < features)[None, :], other=0.0)
    if SILU:
        u = tl.load(weights[1] + at, mask=real[:, None] & (f < features)[None, :], other=0.0)
        bias_u = tl.load(biases[1] + n, mask=n < (BIASED >> 1 & 1) * rows[0], other=0.0)
    b = tl.load(bias + n, mask=n < biased, other=0.0)
    if NORM:
        scale = tl.load(norm + f, mask=f < features, other=0.0)
    if block < AHEAD:  # registers hold no more, and the memory would be idle until the wait is over
        line = tl.minimum(tl.arange(0, FEATURES // LINE) * LINE, features - 1)
        later = (n + AHEAD * ROWS).to(tl.int64)[:, None] * features + line[None, :]
        prefetch(weight + later, PDL)
        if SILU:
            prefetch(weights[1] + later, PDL)
    wait(PDL)

    v = tl.load(x + f, mask=f < features, other=0.0).to(tl.float32)
    if RESIDUAL:  # on its way with x: a load that begins after the sums is time that nothing hides
        y_before = tl.load(residual + first + n, mask=real, other=0.0)
    squares = v * v
    if NORM:  # the norm's factor is the same for all features and comes last
        v *= scale.to(tl.float32)
    acc = w.to(tl.float32) * v[None, :]
    if SILU:
        acc_u = u.to(tl.float32) * v[None, :]
    if LOOP:
        for start in range(FEATURES, features, FEATURES):
            f_now = start + f
            inside = f_now < features
            w = tl.load(weight + at + start, mask=real[:, None] & inside[None, :], other=0.0)
            if SILU:
                u = tl.load(weights[1] + at + start, mask=real[:, None] & inside[None, :], other=0.0)
            v = tl.load(x + f_now, mask=inside, other=0.0).to(tl.float32)
            squares += v * v
            if NORM:
                v *= tl.load(norm + f_now, mask=inside, other=0.0).to(tl.float32)
            acc += w.to(tl.float32) * v[None, :]
            if SILU:
                acc_u += u.to(tl.float32) * v[None, :]
    y = tl.sum(acc, 1)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / features + eps)
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
    """See `ahn.ops.product.product`."""
    K = weights[0].shape[1]
    counts = tuple(weight.shape[0] for weight in weights)
    ROWS, features, registers = tile(K, silu)
    held = tuple(weight.contiguous() for weight in weights)
    out = torch.empty(counts[0] if silu else sum(counts), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(counts[0], ROWS) if silu else sum(triton.cdiv(count, ROWS) for count in counts)
    # Where there is no bias, a pointer that is never read.
    given = tuple(own if bias is None else bias for own, bias in zip(held, biases, strict=True))
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    launch = dependent.options(x)
    if launch["PDL"] and registers is not None:
        launch["maxnreg"] = registers
    one_kind = silu or len(counts) == 1  # the rows after some rows are then of the same matrix
    ahead = AHEAD if launch["PDL"] and one_kind and blocks > 2 * AHEAD else 0
    _product[blocks,](
        x.contiguous(), held, given, counts, norm, None if residual is None else residual.contiguous(), out, K, eps,
        COUNT=len(counts), BIASED=biased, NORM=norm is not None, SILU=silu, RESIDUAL=residual is not None,
        ROWS=ROWS, FEATURES=features, LOOP=features < K, AHEAD=ahead,
        LINE=min(features, LINE_BYTES // x.element_size()), num_warps=WARPS, **launch,
    )  # fmt: skip
    return out

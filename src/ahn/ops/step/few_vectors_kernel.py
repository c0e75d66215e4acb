"""`ahn.ops.step.product` of a few vectors in Triton: products by tensor cores, and what stands between them.

Each program has 64 rows of weights, four rounds of which are under way: fewer rows and it reads more of the vectors
than of the weights. What was measured beside cuBLAS is in docs/log.md ("Products of few vectors").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.step import dependent_launch
from ahn.ops.step.dependent_launch import announce, prefetch, wait
from ahn.ops.step.product_kernel import load_weights, place

LINE_BYTES = tl.constexpr(128)
ROWS, ROUND, STAGES = 64, 256, 4
"""Rows of a program, bytes of each in a round, rounds under way."""
ASKED_FOR = 16 << 20
"""Bytes of weights up to which all are asked for ahead: some 4 µs, which a norm and what else comes before take."""


@triton.jit
def _sums(
    x, at, real, vectors, features, begin, end, VECTORS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(ROWS, VECTORS) products over the features from `begin` to before `end` of rows that start `at` these places."""
    f, m = tl.arange(0, FEATURES), tl.arange(0, VECTORS)
    acc = tl.zeros([ROWS, VECTORS], tl.float32)
    for start in tl.range(begin, end, FEATURES, num_stages=STAGES):
        inside = f < end - start
        w = load_weights(at + start + f[None, :], real, inside)
        own = m[None, :] * features + start + f[:, None]
        v = tl.load(x + own, mask=(m < vectors)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(w, v, acc, input_precision="ieee")
    return acc


@triton.jit
def _ask_for(at, begin, end, AHEAD: tl.constexpr, PDL: tl.constexpr):
    """Have the first weights of each row brought nearer, while what is multiplied with them is being made."""
    LINE: tl.constexpr = LINE_BYTES // (at.dtype.element_ty.primitive_bitwidth // 8)
    COUNT: tl.constexpr = (AHEAD + LINE - 1) // LINE
    f = begin + tl.arange(0, COUNT) * LINE
    prefetch(at + tl.minimum(f, end - 1)[None, :], PDL)


@triton.jit
def _products(
    x, weights, biases, rows, out, features, vectors,
    COUNT: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    block, m = tl.program_id(0), tl.arange(0, VECTORS)
    if SILU:  # half of the rows are of each matrix
        HALF: tl.constexpr = ROWS // 2
        i = tl.arange(0, ROWS)
        of_both = block * HALF + i % HALF
        # Chosen among two pointers, rows would be read number by number: they are told from how far apart they lie.
        apart = (weights[1].to(tl.int64) - weights[0].to(tl.int64)) // (
            weights[0].dtype.element_ty.primitive_bitwidth // 8
        )
        matrix = tl.where(i < HALF, 0, apart)
        within = of_both.to(tl.int64) * features + matrix
        at = weights[0] + tl.multiple_of(within, ALIGNED)[:, None]
        n = block * HALF + tl.arange(0, HALF)
        real, count, first = n < rows[0], rows[0], 0
        b = tl.load(biases[0] + n, mask=n < (BIASED & 1) * rows[0], other=0.0).to(tl.float32)
        b_up = tl.load(biases[1] + n, mask=n < (BIASED >> 1 & 1) * rows[0], other=0.0).to(tl.float32)
        held = tl.minimum(of_both, rows[0] - 1).to(tl.int64) * features + matrix
        _ask_for(weights[0] + held[:, None], 0, features, AHEAD, PDL)
        wait(PDL)
        both = _sums(x, at, of_both < rows[0], vectors, features, 0, features, VECTORS, ROWS, FEATURES, STAGES)
        gate, up = tl.split(both.reshape(2, HALF, VECTORS).permute(1, 2, 0))
        gate += b[:, None]
        y = gate * tl.sigmoid(gate) * (up + b_up[:, None])
    else:
        weight, bias, biased, count, first, local = place(block, weights, biases, rows, COUNT, BIASED, ROWS)
        n = local * ROWS + tl.arange(0, ROWS)
        real = n < count
        b = tl.load(bias + n, mask=n < biased, other=0.0).to(tl.float32)
        held = tl.minimum(n, count - 1).to(tl.int64)
        _ask_for(weight + held[:, None] * features, 0, features, AHEAD, PDL)
        wait(PDL)
        at = weight + n.to(tl.int64)[:, None] * features
        y = _sums(x, at, real, vectors, features, 0, features, VECTORS, ROWS, FEATURES, STAGES) + b[:, None]
    to = (first * vectors + m * count)[None, :] + n[:, None]
    tl.store(out + to, y, mask=(m < vectors)[None, :] & real[:, None])


@triton.jit
def _partial_products(
    x, weight, out, features, count, vectors, width,
    VECTORS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    part, m = tl.program_id(1), tl.arange(0, VECTORS)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = part * width
    end = tl.minimum(begin + width, features)
    if begin < end:
        held = tl.minimum(n, count - 1).to(tl.int64)
        _ask_for(weight + held[:, None] * features, begin, end, STAGES * FEATURES, PDL)
    wait(PDL)
    at = weight + n.to(tl.int64)[:, None] * features
    y = _sums(x, at, n < count, vectors, features, begin, end, VECTORS, ROWS, FEATURES, STAGES)
    to = (part * vectors + m)[None, :] * count + n[:, None]
    tl.store(out + to, y, mask=(m < vectors)[None, :] & (n < count)[:, None])


@triton.jit
def _sum_and_norm(
    x, parts, bias, weight, total, normed, width, vectors, eps,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one vector."""
    announce(PDL)
    m, n = tl.program_id(0), tl.arange(0, WIDTH)
    inside = n < width
    if bias is not None:
        b = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    own = m * width + n
    y = tl.load(x + own, mask=inside, other=0.0).to(tl.float32)
    if parts is not None:
        for part in tl.static_range(PARTS):
            y += tl.load(parts + part * vectors * width + own, mask=inside, other=0.0)
        if bias is not None:
            y += b
        y = y.to(x.dtype.element_ty)
        tl.store(total + own, y, mask=inside)
        y = y.to(tl.float32)
    if weight is not None:
        tl.store(normed + own, y * tl.rsqrt(tl.sum(y * y) / width + eps) * w, mask=inside)


def products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], silu: bool, round_bytes: int = ROUND
) -> Tensor:
    """See `ahn.ops.step.product.products`."""
    K = weights[0].shape[1]
    vectors, counts = x.numel() // K, tuple(weight.shape[0] for weight in weights)
    total = counts[0] if silu else sum(counts)
    held = tuple(weight.contiguous() for weight in weights)
    out = torch.empty(vectors * total, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(counts[0], ROWS // 2) if silu else sum(triton.cdiv(count, ROWS) for count in counts)
    # Where there is no bias, a pointer that is never read.
    given = tuple(own if bias is None else bias for own, bias in zip(held, biases, strict=True))
    ahead, round_features = triton.next_power_of_2(K), round_bytes // x.element_size()
    if sum(weight.nbytes for weight in held) > ASKED_FOR:
        ahead = min(ahead, STAGES * round_features)
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    _products[blocks,](
        x.contiguous(), held, given, counts, out, K, vectors,
        COUNT=len(counts), BIASED=biased, SILU=silu, VECTORS=_vectors(vectors), ROWS=ROWS,
        FEATURES=round_features, STAGES=STAGES, AHEAD=ahead, ALIGNED=_aligned(held), num_warps=4,
        **dependent_launch.options(x),
    )  # fmt: skip
    return out


def _vectors(count: int) -> int:
    """Columns of a tile for so many vectors; tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(count))


def _aligned(weights: Sequence[Tensor]) -> int:
    """Numbers of which every row of all of them begins at a multiple, up to 16 bytes."""
    numbers = 16 // weights[0].element_size()
    whole = all(w.data_ptr() % 16 == 0 and w.shape[1] % numbers == 0 for w in weights)
    return numbers if whole else 1


def partial_products(x: Tensor, weight: Tensor, parts: int, round_bytes: int = ROUND) -> Tensor:
    """See `ahn.ops.step.product.partial_products`; a part is a whole number of rounds."""
    count, K = weight.shape
    vectors, features = x.numel() // K, round_bytes // x.element_size()
    width = triton.cdiv(triton.cdiv(K, features), parts) * features
    out = torch.empty(parts, vectors, count, dtype=torch.float32, device=x.device)
    _partial_products[triton.cdiv(count, ROWS), parts](
        x.contiguous(), weight.contiguous(), out, K, count, vectors, width,
        VECTORS=_vectors(vectors), ROWS=ROWS, FEATURES=features, STAGES=STAGES, num_warps=4,
        **dependent_launch.options(x),
    )  # fmt: skip
    return out


def sum_and_norm(
    x: Tensor, parts: Tensor | None, bias: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `ahn.ops.step.product.sum_and_norm`."""
    width = x.shape[-1]
    nothing, vectors = x.new_empty(0), x.numel() // width
    total = nothing if parts is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = nothing if weight is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(width)
    _sum_and_norm[vectors,](
        x.contiguous(), parts, bias, weight, total, normed, width, vectors, eps,
        PARTS=0 if parts is None else len(parts), WIDTH=block, num_warps=min(16, max(4, block // 256)),
        **dependent_launch.options(x),
    )  # fmt: skip
    return total, normed

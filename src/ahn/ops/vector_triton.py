"""`ahn.ops.vector.long_vector` in Triton: a few rows a program, many programs in flight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
FEATURES = 2048
WARPS = 8


@triton.jit
def _product(x, weight, out, features, rows, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = n < rows
    weight += n.to(tl.int64)[:, None] * features
    acc = tl.zeros([ROWS, FEATURES], tl.float32)
    for start in range(0, features, FEATURES):
        f = start + tl.arange(0, FEATURES)
        inside = f < features
        w = tl.load(weight + f[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        acc += w.to(tl.float32) * tl.load(x + f, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + n, tl.sum(acc, 1), mask=real)


def product(x: Tensor, weight: Tensor, rows: int = ROWS, features: int = FEATURES, warps: int = WARPS) -> Tensor:
    """See `ahn.ops.vector.long_vector`; the other arguments are what a program takes at once."""
    N, K = weight.shape
    out = torch.empty(N, dtype=x.dtype, device=x.device)
    _product[triton.cdiv(N, rows),](
        x.contiguous(), weight.contiguous(), out, K, N, ROWS=rows, FEATURES=features, num_warps=warps
    )  # fmt: skip
    return out

"""The product of a matrix with one vector: what decoding one conversation spends its time on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LONG = 4096  # features from which torch.compile's own reduction falls behind (measured: docs/performance.md)


@torch.library.custom_op("ahn::long_vector", mutates_args=())
def long_vector(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x` for x (K,) and weight (N, K), accumulated in float32: (N,)."""
    if not x.is_cuda:
        return F.linear(x, weight)
    from ahn.ops import vector_triton

    with torch.cuda.device(x.device):
        return vector_triton.product(x, weight)


@long_vector.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, written so that torch.compile reads the weights of a single row at the memory's speed.

    A product with a bias would be a call of cuBLAS; as a product and a sum it becomes a reduction that takes in the
    norm before it and the activation after it. Long rows are left to a kernel of their own.
    """
    if x.numel() != x.shape[-1]:
        return F.linear(x, weight, bias)
    if x.shape[-1] >= LONG:
        y = long_vector(x.reshape(-1), weight).view(*x.shape[:-1], -1)
    else:
        y = torch.mm(x.reshape(1, -1), weight.t()).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias

"""Products of matrices with one or a few vectors, with what stands around them: one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 16
"""Vectors at most: with more of them what each program reads again of these outweighs the weights."""


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    """`product` in plain torch, rounded once, at its end."""
    v = x.reshape(-1, weights[0].shape[1]).float()
    if norm is not None:
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * norm.float()
    parts = [v @ weight.float().mT for weight in weights]
    parts = [y if bias is None else y + bias.float() for y, bias in zip(parts, biases, strict=True)]
    y = F.silu(parts[0]) * parts[1] if silu else torch.cat(parts, dim=1)
    y = (y if residual is None else y + residual.reshape(y.shape).float()).to(x.dtype)
    return y[0] if len(y) == 1 else y


@torch.library.custom_op("ahn::product", mutates_args=())
def product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    """Several linear maps of M vectors, accumulated in float32.

    Args:
        x: M · K numbers in any shape, up to `FEW` vectors one after another.
        weights: (N_i, K) each, of x's dtype.
        biases: (N_i,) or None, one for each weight.
        norm: (K,) weight of an RMSNorm that x goes through first, or None.
        eps: of that norm.
        silu: there are two maps of one size, and the result is `silu(first) · second`.
        residual: M · N numbers in any shape that are added to the result, or None.

    Returns:
        (M, N), the maps one after another, or one of them with `silu`; (N,) of a single vector.
    """
    if not x.is_cuda:
        return reference(x, weights, biases, norm, eps, silu, residual)
    from ahn.ops.step import product_kernel

    with torch.cuda.device(x.device):
        run = product_kernel.product if x.numel() == x.shape[-1] else product_kernel.products
        return run(x, weights, biases, norm, eps, silu, residual)


@product.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    count = weights[0].shape[0] if silu else sum(weight.shape[0] for weight in weights)
    rows = x.numel() // weights[0].shape[1]
    return x.new_empty(count) if rows == 1 else x.new_empty(rows, count)

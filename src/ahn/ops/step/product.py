"""Products of matrices with one vector, with what stands around them in a decoder layer: one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    v = x.reshape(-1).float()
    if norm is not None:
        v = v * torch.rsqrt(v.square().mean() + eps) * norm.float()
    parts = [weight.float() @ v for weight in weights]
    parts = [y if bias is None else y + bias.float() for y, bias in zip(parts, biases, strict=True)]
    y = F.silu(parts[0]) * parts[1] if silu else torch.cat(parts)
    return (y if residual is None else y + residual.reshape(-1).float()).to(x.dtype)


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
    """Several linear maps of one vector, accumulated in float32.

    Args:
        x: K numbers in any shape.
        weights: (N_i, K) each, of x's dtype.
        biases: (N_i,) or None, one for each weight.
        norm: (K,) weight of an RMSNorm that x goes through first, or None.
        eps: of that norm.
        silu: there are two maps of one size, and the result is `silu(first) · second`.
        residual: N numbers in any shape that are added to the result, or None.

    Returns:
        (N,), the maps one after another, or one of them with `silu`.
    """
    if not x.is_cuda:
        return reference(x, weights, biases, norm, eps, silu, residual)
    from ahn.ops.step import product_kernel

    with torch.cuda.device(x.device):
        return product_kernel.product(x, weights, biases, norm, eps, silu, residual)


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
    return x.new_empty(weights[0].shape[0] if silu else sum(weight.shape[0] for weight in weights))

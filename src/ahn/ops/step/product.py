"""Products of matrices with one or a few vectors, with what stands around them: one pass over the weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.ops.backend import multiprocessors

FEW = 16
"""Vectors at most: with more of them what each program reads again of these outweighs the weights."""
_ROWS, _SHORTEST, _MOST_PARTS = 64, 512, 8
"""Of `parts`: rows of a program (`ahn.ops.step.few_vectors_kernel.ROWS`), its fewest features, most parts."""


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    eps: float,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    """`product` in plain torch, of any number of vectors: (M, N), rounded once, at its end."""
    v = x.reshape(-1, weights[0].shape[1]).float()
    if norm is not None:
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * norm.float()
    parts = [v @ weight.float().mT for weight in weights]
    parts = [y if bias is None else y + bias.float() for y, bias in zip(parts, biases, strict=True)]
    y = F.silu(parts[0]) * parts[1] if silu else torch.cat(parts, dim=1)
    return (y if residual is None else y + residual.reshape(y.shape).float()).to(x.dtype)


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
        return reference(x, weights, biases, norm, eps, silu, residual)[0]
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


@torch.library.custom_op("ahn::products", mutates_args=())
def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], silu: bool) -> Tensor:
    """Several linear maps of M vectors, up to `FEW`, accumulated in float32.

    What stands before and after them is `sum_and_norm`: it is work on few numbers, which here every program would do
    again.

    Args:
        x: M · K numbers in any shape, one vector after another.
        weights, biases, silu: as for `product`.

    Returns:
        (M · N,), the (M, N_i) of each map one after another, so that nobody has to copy them, or one with `silu`.
    """
    if not x.is_cuda:
        y = reference(x, weights, biases, None, 0.0, silu, None)
        return y.flatten() if silu else torch.cat([own.flatten() for own in y.split([len(w) for w in weights], 1)])
    from ahn.ops.step import few_vectors_kernel

    with torch.cuda.device(x.device):
        return few_vectors_kernel.products(x, weights, biases, silu)


@products.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], silu: bool) -> Tensor:
    count = weights[0].shape[0] if silu else sum(weight.shape[0] for weight in weights)
    return x.new_empty(x.numel() // weights[0].shape[1] * count)


@torch.library.custom_op("ahn::sum_and_norm", mutates_args=())
def sum_and_norm(
    x: Tensor, parts: Tensor | None, bias: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What stands between products of M vectors: a residual sum, the norm of what comes of it, or both in one pass.

    Args:
        x: M · N numbers in any shape, one vector after another.
        parts: (S, M, N) float32 of `partial_products`, added to x; None for no sum.
        bias: (N,) that comes with the parts, or None.
        weight: (N,) of an RMSNorm of the sum, rounded to x's type, or of x; None for no norm.
        eps: of that norm.

    Returns:
        The sum and what the norm makes of it, each as x is, or empty where it is not asked for.
    """
    if x.is_cuda:
        from ahn.ops.step import few_vectors_kernel

        with torch.cuda.device(x.device):
            return few_vectors_kernel.sum_and_norm(x, parts, bias, weight, eps)
    total, normed = x, x.new_empty(0)
    if parts is not None:
        y = x.float() + parts.sum(0).view(x.shape)
        total = (y if bias is None else y + bias.float()).to(x.dtype)
    if weight is not None:
        y = total.float()
        normed = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
    return x.new_empty(0) if parts is None else total, normed


@sum_and_norm.register_fake
def _(x: Tensor, parts: Tensor | None, bias: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    nothing, whole = x.new_empty(0), x.new_empty(x.shape)
    return nothing if parts is None else whole, nothing if weight is None else x.new_empty(x.shape)


@torch.library.custom_op("ahn::partial_products", mutates_args=())
def partial_products(x: Tensor, weight: Tensor) -> Tensor:
    """A linear map of M vectors in S parts of the features, (S, M, N) float32: the result is their sum.

    A matrix with few rows gives too few programs to keep a GPU busy. `sum_and_norm`, which adds to the result anyway,
    adds the parts up in the same pass.

    Args:
        x: M · K numbers in any shape, one vector after another.
        weight: (N, K) of x's dtype.
    """
    if not x.is_cuda:
        width = -(-weight.shape[1] // parts(weight))
        pieces = x.reshape(-1, weight.shape[1]).float().split(width, -1), weight.float().split(width, -1)
        return torch.stack([v @ w.mT for v, w in zip(*pieces, strict=True)])
    from ahn.ops.step import few_vectors_kernel

    with torch.cuda.device(x.device):
        return few_vectors_kernel.partial_products(x, weight, parts(weight))


@partial_products.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    count, features = weight.shape
    return x.new_empty(parts(weight), x.numel() // features, count, dtype=torch.float32)


def parts(weight: Tensor) -> int:
    """S of `partial_products`: two programs for each multiprocessor, if none then has fewer than 512 features."""
    count, features = weight.shape
    return max(1, min(2 * multiprocessors(weight.device) // -(-count // _ROWS), features // _SHORTEST, _MOST_PARTS))

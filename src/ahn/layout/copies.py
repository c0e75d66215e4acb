"""Copies along the tokens of keys and values, 16 bytes at a time.

torch joins and gathers what is not contiguous one element after the other: 2 bytes for every index that is worked
out. Nothing is computed with the elements, so that several of them can pass for one of torch's widest type.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_WIDEST = torch.complex128


def join(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat(parts, dim=2)` of (B, H, T_i, ...)."""
    if len({x.dtype for x in parts}) == 1 and all(_fits(x) for x in parts):
        return torch.cat([x.view(_WIDEST) for x in parts], dim=2).view(parts[0].dtype)
    return torch.cat(list(parts), dim=2)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """`x.index_select(2, tokens)` of (B, H, T, ...)."""
    return x.view(_WIDEST).index_select(2, tokens).view(x.dtype) if _fits(x) else x.index_select(2, tokens)


def take_into(x: Tensor, tokens: Tensor, target: Tensor) -> None:
    """`target.copy_(x.index_select(2, tokens))` of (B, H, T, ...), without a copy between."""
    if (x.dtype, x.device) != (target.dtype, target.device):
        target.copy_(take(x, tokens))
    elif _fits(x) and _fits(target):
        torch.index_select(x.view(_WIDEST), 2, tokens, out=target.view(_WIDEST))
    else:
        torch.index_select(x, 2, tokens, out=target)


def _fits(x: Tensor) -> bool:
    """Whether every token's numbers are whole, aligned elements of the widest type, and nobody wants gradients."""
    if x.dim() < 4 or x.device.type not in ("cuda", "cpu") or (x.requires_grad and torch.is_grad_enabled()):
        return False
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    whole = all(step * x.itemsize % _WIDEST.itemsize == 0 for step in steps)
    return whole and x.stride(-1) == 1 and x.data_ptr() % _WIDEST.itemsize == 0

"""Parts of a decoder layer as modeling files write them."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of x (..., K)."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

"""Two bits a number: rotate a vector, scale it, round each number to one of four levels, four codes a byte.

A rotation makes the numbers of any vector look Gaussian (QuaRot, arXiv 2404.00456), and for Gaussian numbers the best
four levels are known (Lloyd 1982, Max 1960), so nothing has to be learned or calibrated. A vector's one scale decides
what the codes preserve: the least squared error, which suits values, or every inner product on average, which suits
keys (TurboQuant, arXiv 2504.19874): the levels pull a vector towards zero, and a softmax over such keys is too flat.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = 2
PER_BYTE = 8 // BITS
LEVELS = (-1.5104176, -0.4527800, 0.4527800, 1.5104176)
"""Of the Lloyd-Max quantiser of a standard normal number; its mean squared error is 0.1175."""
EDGES = (-0.9815988, 0.0, 0.9815988)


def rotate(x: Tensor) -> Tensor:
    """x (..., P) times a Hadamard matrix over the largest power of two that divides P; its own inverse."""
    size = x.shape[-1] & -x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        return (x.unflatten(-1, (-1, size)) @ _hadamard(size, x.dtype, x.device)).flatten(-2)


def encode(x: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Vectors to codes and scales. The result for one vector does not depend on the others.

    Args:
        x: (..., P) with P a multiple of 4.
        unbiased: choose the scale so that the decoded vector has the product |x|² with x itself, and so on average the
            right product with any other vector; else so that it lies closest to x.

    Returns:
        Codes (..., P / 4) uint8 and scales (...) bfloat16.
    """
    y = rotate(x.to(precise(x.dtype)))
    deviation = y.square().mean(-1, keepdim=True).sqrt().clamp_min(_tiny(y))
    code = torch.bucketize(y / deviation, _numbers(EDGES, y.dtype, y.device))
    level = _numbers(LEVELS, y.dtype, y.device)[code]
    product = (y * level).sum(-1)
    scale = y.square().sum(-1) / product.clamp_min(_tiny(y)) if unbiased else product / level.square().sum(-1)
    places = BITS * torch.arange(PER_BYTE, device=x.device)
    return (code.unflatten(-1, (-1, PER_BYTE)) << places).sum(-1).to(torch.uint8), scale.bfloat16()


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors (..., P) that `encode` left of its input: float32, or float64 for a `dtype` of that precision."""
    return rotate(turned(codes, scale, precise(dtype)))


def turned(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `decode` gives before it is rotated back, (..., P) of this type."""
    level = F.embedding(codes.int(), _bytes(dtype, codes.device)).flatten(-2)
    return level * scale.to(dtype).unsqueeze(-1)


def precise(dtype: torch.dtype) -> torch.dtype:
    """What codes of such numbers are worked out in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _numbers(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(len(numbers),); kept, since bringing them to a GPU waits for all that it has to do."""
    return torch.tensor(numbers, dtype=dtype, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size) orthogonal and symmetric; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    pair = torch.tensor([[1, 1], [1, -1]], dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix / size**0.5


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 4) the levels of the four codes in each byte."""
    places = BITS * torch.arange(PER_BYTE, device=device)
    codes = torch.arange(256, device=device)[:, None] >> places & (2**BITS - 1)
    return torch.tensor(LEVELS, dtype=dtype, device=device)[codes]

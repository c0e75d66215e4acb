"""Two, three or four bits per number: rotate a vector, scale it, round each number to one of 4, 8 or 16 levels.

A rotation makes the numbers of any vector look Gaussian (QuaRot, arXiv 2404.00456), and for Gaussian numbers the best
levels are known (Lloyd 1982, Max 1960), so nothing has to be learned or calibrated. A vector's one scale decides
what the codes preserve: the least squared error, which suits values, or every inner product on average, which suits
keys (TurboQuant, arXiv 2504.19874): the levels pull a vector towards zero, and a softmax over such keys is too flat.
"""

import itertools
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.errors import AHNError

BITS = 2
"""Where nothing else is said."""
LEVELS = {
    2: (-1.5104176, -0.4527800, 0.4527800, 1.5104176),
    3: (-2.1519457, -1.3439093, -0.7560053, -0.2450942, 0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (
        *(-2.7325896, -2.0690172, -1.6180464, -1.2562312, -0.9423405, -0.6567591, -0.3880483, -0.1283950),
        *(0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
    ),
}
"""Of the Lloyd-Max quantisers of a standard normal number; mean squared errors 0.1175, 0.03455 and 0.009501."""
EDGES = {bits: tuple((a + b) / 2 for a, b in itertools.pairwise(levels)) for bits, levels in LEVELS.items()}


def per_group(bits: int) -> int:
    """Codes that fill whole bytes together: 4 of 2 bits one byte, 8 of 3 bits three bytes, 2 of 4 bits one byte.

    Raises:
        AHNError: there are no levels for so many bits.
    """
    if bits not in LEVELS:
        raise AHNError(f"Codes have {', '.join(map(str, LEVELS))} bits per number, not {bits!r}.")
    return math.lcm(bits, 8) // bits


def code_bytes(numbers: int, bits: int) -> int:
    """Bytes of the codes of a vector with so many numbers, a multiple of `per_group(bits)`."""
    return numbers // per_group(bits) * (per_group(bits) * bits // 8)


def rotate(x: Tensor) -> Tensor:
    """x (..., P) times a Hadamard matrix over the largest power of two that divides P; its own inverse."""
    size = x.shape[-1] & -x.shape[-1]
    x = x.unflatten(-1, (-1, size))
    if torch.compiler.is_compiling():
        return (x[..., None, :] * _signs(size, x.device)).sum(-1).flatten(-2) / size**0.5
    with torch.autocast(x.device.type, enabled=False):
        return (x @ _hadamard(size, x.dtype, x.device)).flatten(-2)


def encode(x: Tensor, unbiased: bool, bits: int = BITS) -> tuple[Tensor, Tensor]:
    """Vectors to codes and scales. The result for one vector does not depend on the others.

    Args:
        x: (..., P) with P a multiple of `per_group(bits)`.
        unbiased: choose the scale so that the decoded vector has the product |x|² with x itself, and so on average the
            right product with any other vector; else so that it lies closest to x.
        bits: per number, 2, 3 or 4.

    Returns:
        Codes (..., P · bits / 8) uint8, the first number in the lowest bits, and scales (...) bfloat16.

    Raises:
        AHNError: there are no codes of so many bits.
    """
    per_group(bits)
    y = rotate(x.to(precise(x.dtype)))
    square = y.square()
    code, level = nearest(y / deviation(square), bits)
    product = (y * level).sum(-1)
    scale = square.sum(-1) / product.clamp_min(tiny(y)) if unbiased else product / level.square().sum(-1)
    return packed(code, bits), scale.bfloat16()


def deviation(square: Tensor) -> Tensor:
    """(..., 1) the root of the mean of the squares of each vector's numbers, (..., P)."""
    return square.mean(-1, keepdim=True).sqrt().clamp_min(tiny(square))


def nearest(z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of numbers (...) of deviation 1 the codes, int64, and the levels that they mean."""
    code = _between(z, bits)
    if torch.compiler.is_compiling():
        return code, _level(code, bits, z.dtype)
    return code, _numbers(LEVELS[bits], z.dtype, z.device)[code]


def packed(code: Tensor, bits: int) -> Tensor:
    """Codes (..., P) to bytes (..., P · bits / 8) uint8, the first number in the lowest bits."""
    return _packed(code.unflatten(-1, (-1, per_group(bits))), bits).flatten(-2)


def _between(y: Tensor, bits: int) -> Tensor:
    """Between which edges each number lies, int64; on a CPU many comparisons at once are faster than a search each."""
    if torch.compiler.is_compiling():
        return sum(((y > edge).long() for edge in EDGES[bits]), torch.zeros_like(y, dtype=torch.long))
    if y.device.type != "cpu":
        return torch.bucketize(y, _numbers(EDGES[bits], y.dtype, y.device))
    count = torch.zeros(y.shape, dtype=torch.uint8)
    for edge in EDGES[bits]:
        count += y > edge
    return count.long()


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype, bits: int = BITS) -> Tensor:
    """The vectors (..., P) that `encode` left of its input: float32, or float64 for a `dtype` of that precision."""
    return rotate(decode_rotated(codes, scale, precise(dtype), bits))


def decode_rotated(codes: Tensor, scale: Tensor, dtype: torch.dtype, bits: int = BITS) -> Tensor:
    """What `decode` gives before it is rotated back, (..., P) of this type."""
    groups = codes.unflatten(-1, (-1, per_group(bits) * bits // 8))
    if torch.compiler.is_compiling():
        level = _level(_unpacked(groups, bits), bits, dtype)
    elif groups.shape[-1] == 1:  # all that a byte can say is known
        level = F.embedding(codes.int(), _bytes(bits, dtype, codes.device))
    else:
        level = F.embedding(_unpacked(groups, bits), _numbers(LEVELS[bits], dtype, codes.device)[:, None]).squeeze(-1)
    return level.flatten(-2) * scale.to(dtype).unsqueeze(-1)


def _packed(code: Tensor, bits: int) -> Tensor:
    """Groups of codes (..., G), as many as fill whole bytes, to these bytes (..., G · bits / 8)."""
    count = code.shape[-1] * bits // 8
    if torch.compiler.is_compiling():
        word = sum((x << bits * place for place, x in enumerate(code.unbind(-1))), torch.zeros_like(code[..., 0]))
        return torch.stack([word >> 8 * place & 255 for place in range(count)], dim=-1).to(torch.uint8)
    word = (code << _shifts(code.shape[-1], bits, code.device)).sum(-1, keepdim=True)
    return (word if count == 1 else word >> _shifts(count, 8, code.device) & 255).to(torch.uint8)


def _level(code: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Of codes in compiled code, which has no table: it would be brought to the GPU in every call."""
    half = 2 ** (bits - 1)
    size = torch.where(code >= half, code - half, half - 1 - code)
    level = torch.full_like(size, LEVELS[bits][half], dtype=dtype)
    for place, number in enumerate(LEVELS[bits][half + 1 :]):
        level = torch.where(size > place, number, level)
    return torch.where(code >= half, level, -level)


def _signs(size: int, device: torch.device) -> Tensor:
    """`signs` in compiled code: by how many bits two indices have in common."""
    index = torch.arange(size, device=device)
    common = index[:, None] & index
    for by in (8, 4, 2, 1):
        common = common ^ common >> by
    return 1 - 2 * (common & 1)


def _unpacked(groups: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`, int32."""
    places = torch.arange(groups.shape[-1], dtype=torch.int32, device=groups.device)
    word = (groups.int() << 8 * places).sum(-1, keepdim=True, dtype=torch.int32)
    return word >> bits * torch.arange(per_group(bits), dtype=torch.int32, device=groups.device) & 2**bits - 1


def precise(dtype: torch.dtype) -> torch.dtype:
    """What codes of such numbers are worked out in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def tiny(x: Tensor) -> float:
    """The least number by which vectors of this type are divided."""
    return torch.finfo(x.dtype).tiny


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _numbers(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(len(numbers),); kept, since bringing them to a GPU waits for all that it has to do."""
    return torch.tensor(numbers, dtype=dtype, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _shifts(count: int, by: int, device: torch.device) -> Tensor:
    """(count,) by how many bits each of several numbers in a word is shifted."""
    return by * torch.arange(count, device=device)


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
def signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix (size, size) times the root of its size; kept, so that a captured step may read it."""
    return _hadamard(size, torch.float64, torch.device("cpu")).sign().to(device, dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _bytes(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8 / bits) the levels of the codes in each byte, of bits that divide 8."""
    codes = _unpacked(torch.arange(256, device=device)[:, None], bits)
    return torch.tensor(LEVELS[bits], dtype=dtype, device=device)[codes]

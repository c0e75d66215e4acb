"""Codes of `ahn.ops.quantize` in a step's kernels: of one vector, read and written, and of many tokens, as levels."""

from __future__ import annotations

import triton
import triton.language as tl

from ahn.ops.quantize import EDGES, LEVELS

# Those above zero, the innermost first; the others are their mirror image.
_TWO_0, _TWO_1 = map(tl.constexpr, LEVELS[2][2:])
_THREE_0, _THREE_1, _THREE_2, _THREE_3 = map(tl.constexpr, LEVELS[3][4:])
_FOUR_0, _FOUR_1, _FOUR_2, _FOUR_3, _FOUR_4, _FOUR_5, _FOUR_6, _FOUR_7 = map(tl.constexpr, LEVELS[4][8:])
_TWO_EDGE = tl.constexpr(EDGES[2][2])
_THREE_EDGE_1, _THREE_EDGE_2, _THREE_EDGE_3 = map(tl.constexpr, EDGES[3][4:])
_FOUR_EDGE_1, _FOUR_EDGE_2, _FOUR_EDGE_3, _FOUR_EDGE_4 = map(tl.constexpr, EDGES[4][8:12])
_FOUR_EDGE_5, _FOUR_EDGE_6, _FOUR_EDGE_7 = map(tl.constexpr, EDGES[4][12:])


@triton.jit
def code_of(z, BITS: tl.constexpr):
    """The codes of numbers: how many edges lie below each."""
    code = (z > 0.0).to(tl.int32)
    if BITS == 2:
        return code + _around(z, _TWO_EDGE)
    if BITS == 3:
        return code + _around(z, _THREE_EDGE_1) + _around(z, _THREE_EDGE_2) + _around(z, _THREE_EDGE_3)
    code += _around(z, _FOUR_EDGE_1) + _around(z, _FOUR_EDGE_2) + _around(z, _FOUR_EDGE_3) + _around(z, _FOUR_EDGE_4)
    return code + _around(z, _FOUR_EDGE_5) + _around(z, _FOUR_EDGE_6) + _around(z, _FOUR_EDGE_7)


@triton.jit
def _around(z, edge):
    return (z > edge).to(tl.int32) + (z > -edge).to(tl.int32)


@triton.jit
def level_of(code, BITS: tl.constexpr):
    """The levels that codes stand for, float32."""
    return _level(_by_size(code, BITS), BITS)


@triton.jit
def _by_size(code, BITS: tl.constexpr):
    """Codes, or words full of them: the lower bits of each count from zero outwards, the upper one is the sign."""
    if BITS == 2:
        return code ^ ((~code >> 1) & 0x55555555)
    if BITS == 3:
        return code ^ (((~code >> 2) & 0x249249) * 3)
    return code ^ (((~code >> 3) & 0x11111111) * 7)


@triton.jit
def _level(x, BITS: tl.constexpr):
    """Of one code of `_by_size` in the lowest bits; what stands in the others does not matter."""
    a, b, c = (x & 1) != 0, (x & 2) != 0, (x & 4) != 0
    if BITS == 2:
        size = tl.where(a, _TWO_1, _TWO_0)
        return tl.where(b, size, -size)
    if BITS == 3:
        size = tl.where(b, tl.where(a, _THREE_3, _THREE_2), tl.where(a, _THREE_1, _THREE_0))
        return tl.where(c, size, -size)
    inner = tl.where(b, tl.where(a, _FOUR_3, _FOUR_2), tl.where(a, _FOUR_1, _FOUR_0))
    outer = tl.where(b, tl.where(a, _FOUR_7, _FOUR_6), tl.where(a, _FOUR_5, _FOUR_4))
    size = tl.where(c, outer, inner)
    return tl.where((x & 8) != 0, size, -size)


@triton.jit
def load_codes(codes, P: tl.constexpr, BITS: tl.constexpr):
    """The codes (P,) of one vector, whose bytes begin at this pointer."""
    p = tl.arange(0, P)
    at = p * BITS // 8
    word = tl.load(codes + at).to(tl.int32)
    if BITS == 3:  # some lie in two bytes
        word |= tl.load(codes + at + 1, mask=at + 1 < P * BITS // 8, other=0).to(tl.int32) << 8
    return (word >> (p * BITS % 8)) & ((1 << BITS) - 1)


@triton.jit
def pack_codes(code, P: tl.constexpr, BITS: tl.constexpr):
    """Codes (P,) of one vector in words of whole bytes, as many as `store_codes` takes."""
    GROUP: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    return tl.sum(tl.reshape(code, [P // GROUP, GROUP]) << (BITS * tl.arange(0, GROUP))[None, :], 1)


@triton.jit
def store_codes(codes, packed, P: tl.constexpr, BITS: tl.constexpr):
    """Write what `pack_codes` gave to the bytes that begin at this pointer."""
    GROUP: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    BYTES: tl.constexpr = GROUP * BITS // 8
    g = tl.arange(0, P // GROUP)
    for byte in tl.static_range(BYTES):
        tl.store(codes + g * BYTES + byte, ((packed >> (8 * byte)) & 255).to(tl.uint8))


@triton.jit
def levels(
    words, t, inside, P: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The levels of tokens t (N,), float32: (N, COUNT) from the FIRST number of each on.

    Args:
        words: of codes, int32; of three bits, uint8.
    """
    if BITS == 3:
        w = tl.arange(0, COUNT // 8)
        at = words + t[:, None] * (P * 3 // 8) + FIRST * 3 // 8 + 3 * w[None, :]
        packed = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
        packed |= tl.load(at + 1, mask=inside[:, None], other=0).to(tl.int32) << 8
        packed |= tl.load(at + 2, mask=inside[:, None], other=0).to(tl.int32) << 16
    else:
        w = tl.arange(0, COUNT * BITS // 32)
        at = words + t[:, None] * (P * BITS // 32) + FIRST * BITS // 32 + w[None, :]
        packed = tl.load(at, mask=inside[:, None], other=0)
    return tl.reshape(_level(_spread(_by_size(packed, BITS), BITS), BITS), [BLOCK_N, COUNT])


@triton.jit
def _spread(x, BITS: tl.constexpr):
    """Each word shifted by 0, 1, 2, … codes, in new dimensions whose numbers one thread holds together."""
    if BITS == 2:
        x = tl.join(x, x >> 16)
    x = tl.join(x, x >> (12 if BITS == 3 else 4 * BITS if BITS == 4 else 8))
    x = tl.join(x, x >> (6 if BITS == 3 else 2 * BITS if BITS == 4 else 4))
    return tl.join(x, x >> BITS)

"""Codes of `ahn.ops.quantize` in a step's kernels: of one vector, read and written, and of many tokens, as levels."""

from __future__ import annotations

import torch
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


def _bytes_of(levels: tuple[float, ...], shift: int) -> list[str]:
    """Of each level in bfloat16 the byte from this bit on, four a word, as `prmt` takes them."""
    numbers = torch.tensor(levels).bfloat16().view(torch.int16).tolist()
    parts = [numbers[at : at + 4] for at in range(0, len(numbers), 4)]
    return [f"0x{sum((number >> shift & 255) << 8 * n for n, number in enumerate(part)):08x}" for part in parts]


def _asm_of_four() -> str:
    """The eight levels of a word ($8), in the order of the text: `prmt` looks up four bytes at once, by four bits each.

    The fourth of these bits asks for copies of the byte's sign instead of the byte, which the sizes must not and the
    signs do.
    """
    lower, upper = (_bytes_of(LEVELS[4][8:], shift) for shift in (0, 8))
    lines = [".reg .b32 x, m, h, l, s, r;", "mov.b32 x, $8;", "and.b32 m, x, 0x77777777;"]
    for half in range(2):
        if half:
            lines += ["shr.u32 x, x, 16;", "shr.u32 m, m, 16;"]
        lines += [
            f"prmt.b32 l, {lower[0]}, {lower[1]}, m;",
            f"prmt.b32 h, {upper[0]}, {upper[1]}, m;",
            "prmt.b32 s, 0x7f7f7f7f, 0x7f7f7f7f, x;",  # 0 above zero, 0x7f below
            "shl.b32 s, s, 1;",
            "lop3.b32 h, h, s, 0x80808080, 0xf8;",
            *_pairs_of(4 * half),
        ]
    return "{" + " ".join(lines) + "}"


def _asm_of_two() -> str:
    """Of the lower half of a word ($8) the eight levels, in the order of `placed`: even codes, then odd ones."""
    (lower,), (upper,) = (_bytes_of(LEVELS[2], shift) for shift in (0, 8))
    lines = [".reg .b32 x, h, l, r;"]
    for odd in range(2):
        lines += [
            "shr.u32 x, $8, 2;" if odd else "mov.b32 x, $8;",
            "and.b32 x, x, 0x3333;",
            f"prmt.b32 l, {lower}, 0, x;",
            f"prmt.b32 h, {upper}, 0, x;",
            *_pairs_of(4 * odd),
        ]
    return "{" + " ".join(lines) + "}"


def _pairs_of(first: int) -> list[str]:
    """Four numbers, from this output on, of their lower and their upper bytes."""
    return [
        f"prmt.b32 r, l, h, 0x5140; mov.b32 {{${first}, ${first + 1}}}, r;",
        f"prmt.b32 r, l, h, 0x7362; mov.b32 {{${first + 2}, ${first + 3}}}, r;",
    ]


_ASM_FOUR, _ASM_TWO = tl.constexpr(_asm_of_four()), tl.constexpr(_asm_of_two())


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
    BITS: tl.constexpr, DTYPE: tl.constexpr, BY_BYTES: tl.constexpr,
):  # fmt: skip
    """The levels of tokens t (N,): (N, COUNT) of this type, from the FIRST number of each on, in the order of `placed`.

    Args:
        words: of codes, int32; of three bits, uint8.
        BY_BYTES: whether bfloat16 levels are looked up by the machine's instruction for bytes; not of three bits.
    """
    packed = _words(words, t, inside, P, FIRST, COUNT, BITS)
    if BY_BYTES:
        found = _looked_up(_by_size(packed, BITS) if BITS == 4 else tl.join(packed, packed >> 16), BITS)
    else:
        found = _level(_spread(_by_size(packed, BITS), BITS), BITS)
    return tl.reshape(found, [BLOCK_N, COUNT]).to(DTYPE)


@triton.jit
def _words(words, t, inside, P: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Codes of tokens t (N,) in words (N, W) of 32 bits, or of eight codes of three bits."""
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
    return packed


@triton.jit
def placed(p, BITS: tl.constexpr, BY_BYTES: tl.constexpr):
    """Which number of a vector `levels` gives in place p."""
    if BY_BYTES and BITS == 2:
        p = 8 * (p // 8) + 2 * (p % 4) + p % 8 // 4
    return p


@triton.jit
def _looked_up(x, BITS: tl.constexpr):
    """Eight levels of each number, bfloat16, in three new dimensions."""
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        _ASM_FOUR if BITS == 4 else _ASM_TWO, "=h,=h,=h,=h,=h,=h,=h,=h,r", [x],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    first, second = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(first, second).to(tl.bfloat16, bitcast=True)


@triton.jit
def _spread(x, BITS: tl.constexpr):
    """Each word shifted by 0, 1, 2, … codes, in new dimensions whose numbers one thread holds together."""
    if BITS == 2:
        x = tl.join(x, x >> 16)
    x = tl.join(x, x >> (12 if BITS == 3 else 4 * BITS if BITS == 4 else 8))
    x = tl.join(x, x >> (6 if BITS == 3 else 2 * BITS if BITS == 4 else 4))
    return tl.join(x, x >> BITS)

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


def _bytes_of(levels: tuple[float, ...], shift: int, half: bool) -> list[str]:
    """Of each level in float16 or bfloat16 the byte from this bit on, four a word, as `prmt` takes them."""
    numbers = torch.tensor(levels).to(torch.float16 if half else torch.bfloat16).view(torch.int16).tolist()
    parts = [numbers[at : at + 4] for at in range(0, len(numbers), 4)]
    return [f"0x{sum((number >> shift & 255) << 8 * n for n, number in enumerate(part)):08x}" for part in parts]


_BESIDE = ("0x5140", "0x7362")
"""Picks of `prmt` that put bytes of two words beside each other: the first and second, the third and fourth of each."""


def _asm_of_four(half: bool) -> str:
    """The eight levels of each of two words ($8, $9), one of either in an output: `prmt` looks up four at once.

    Codes count upwards. `n` makes their three lower bits count from zero outwards; the fourth, of a selector, asks for
    copies of the sign instead of the byte, and so leaves 0x40 of what is below zero alone, twice which is a sign.
    """
    lower, upper = (_bytes_of(LEVELS[4][8:], shift, half) for shift in (0, 8))
    lines = [".reg .b32 x, m, n, h, l, s;"]
    for word, pick in enumerate(_BESIDE):
        lines += [
            f"prmt.b32 x, $8, $9, {pick};",
            "shr.u32 n, x, 3;",
            "lop3.b32 n, n, 0x11111111, 0, 0x0c;",  # ~n & 0x11111111
            "mul.lo.u32 n, n, 7;",
            "lop3.b32 m, x, n, 0x77777777, 0x28;",  # (x ^ n) & 0x77777777
        ]
        for upper_half in range(2):
            if upper_half:
                lines += ["shr.u32 x, x, 16;", "shr.u32 m, m, 16;"]
            first = 4 * word + 2 * upper_half
            lines += [
                f"prmt.b32 l, {lower[0]}, {lower[1]}, m;",
                f"prmt.b32 h, {upper[0]}, {upper[1]}, m;",
                "prmt.b32 s, 0x40404040, 0x40404040, x;",
                "mad.lo.u32 h, s, 2, h;",
                f"prmt.b32 ${first}, l, h, 0x6240;",
                f"prmt.b32 ${first + 1}, l, h, 0x7351;",
            ]
    return "{" + " ".join(lines) + "}"


def _asm_of_two(half: bool) -> str:
    """The sixteen levels of each of two words ($16, $17), one of either in an output.

    Four levels are eight bytes, all that `prmt` chooses from: the lower byte of a level by its code, the upper one by
    four more, so a code times 17, and 0x40, asks for both.
    """
    (lower,), (upper,) = (_bytes_of(LEVELS[2], shift, half) for shift in (0, 8))
    lines = [".reg .b32 x, c;"]
    for word, pick in enumerate(_BESIDE):
        lines += [f"prmt.b32 x, $16, $17, {pick};"]
        for n in range(4):
            lines += [
                f"shr.u32 c, x, {2 * n};",
                "and.b32 c, c, 0x03030303;",
                "mad.lo.u32 c, c, 17, 0x40404040;",
                f"prmt.b32 ${8 * word + n}, {lower}, {upper}, c;",
                "shr.u32 c, c, 16;",
                f"prmt.b32 ${8 * word + 4 + n}, {lower}, {upper}, c;",
            ]
    return "{" + " ".join(lines) + "}"


_FOUR_HALF, _FOUR_BFLOAT = tl.constexpr(_asm_of_four(True)), tl.constexpr(_asm_of_four(False))
_TWO_HALF, _TWO_BFLOAT = tl.constexpr(_asm_of_two(True)), tl.constexpr(_asm_of_two(False))
_EIGHT, _SIXTEEN = tl.constexpr((tl.int16,) * 8), tl.constexpr((tl.int16,) * 16)


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
def levels(words, BITS: tl.constexpr, DTYPE: tl.constexpr, BY_BYTES: tl.constexpr):
    """The levels of codes in words (A, N, W) of 32 bits, or of eight codes of three bits: (A, N, W, C) of this type.

    Args:
        BY_BYTES: whether float16 or bfloat16 levels are looked up by the machine's instruction for bytes; not of three
            bits.
    """
    low, high = _halves(words, BITS, DTYPE, BY_BYTES)
    A: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    W: tl.constexpr = words.shape[2]
    x = tl.permute(tl.join(low, high), (0, 1, 2, 4, 3))
    return tl.reshape(x, [A, N, W, codes_of(BITS)])


@triton.jit
def level_halves(words, BITS: tl.constexpr, DTYPE: tl.constexpr, BY_BYTES: tl.constexpr):
    """The same, of codes in the lower and in the upper half of each word: twice (A, N, W, C / 2)."""
    return _halves(words, BITS, DTYPE, BY_BYTES)


@triton.jit
def _halves(words, BITS: tl.constexpr, DTYPE: tl.constexpr, BY_BYTES: tl.constexpr):
    A: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    W: tl.constexpr = words.shape[2]
    HALF: tl.constexpr = codes_of(BITS) // 2
    if BY_BYTES:
        if BITS == 2:
            low, high = _looked_up_of_two(words, DTYPE)
        else:
            low, high = _looked_up_of_four(words, DTYPE)
    else:
        x = _level(_spread(_by_size(words, BITS), BITS), BITS).to(DTYPE)
        low, high = tl.split(tl.permute(tl.reshape(x, [A, N, W, 2, HALF]), (0, 1, 2, 4, 3)))
    return tl.reshape(low, [A, N, W, HALF]), tl.reshape(high, [A, N, W, HALF])


@triton.constexpr_function
def codes_of(bits: int) -> int:
    """How many codes a word has."""
    return 16 if bits == 2 else 8


@triton.constexpr_function
def word_stride(numbers: int, bits: int) -> int:
    """How many of what codes lie in, words or of three bits bytes, a vector takes."""
    return numbers * 3 // 8 if bits == 3 else numbers // codes_of(bits)


@triton.jit
def load_words(words, t, FIRST: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr):
    """Codes of tokens t (A, N): COUNT of their numbers, from the FIRST on, in words as `levels` takes them."""
    C: tl.constexpr = codes_of(BITS)
    w = tl.arange(0, COUNT // C)[None, None, :]
    if BITS == 3:
        at = words + t[:, :, None] * word_stride(P, BITS) + FIRST * 3 // 8 + 3 * w
        packed = tl.load(at).to(tl.int32)
        packed |= tl.load(at + 1).to(tl.int32) << 8
        packed |= tl.load(at + 2).to(tl.int32) << 16
    else:
        packed = tl.load(words + t[:, :, None] * word_stride(P, BITS) + FIRST // C + w)
    return packed


@triton.jit
def in_row(x):
    """(A, N, W, C) as (A, N, W C), so that what a thread multiplies comes of its own words: see `place_in_row`."""
    A: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    C: tl.constexpr = x.shape[3]
    if W == 8:
        y = tl.permute(tl.reshape(x, [A, N, 4, 2, C // 2, 2]), (0, 1, 4, 2, 5, 3))
    else:
        y = tl.permute(x, (0, 1, 3, 2))
    return tl.reshape(y, [A, N, W * C])


@triton.jit
def place_in_row(k, W: tl.constexpr, C: tl.constexpr):
    """Of what stands in place k of `in_row`: its word, and its place there."""
    if W == 8:
        w, c = k % 2 + k // 4 % 4 * 2, k // 2 % 2 + k // 16 * 2
    else:
        w, c = k % W, k // W
    return w, c


@triton.jit
def in_columns(x):
    """(A, N, W, C) as (A, C W, N): see `place_in_column`."""
    A: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    C: tl.constexpr = x.shape[3]
    return tl.reshape(tl.permute(x, (0, 3, 2, 1)), [A, C * W, N])


@triton.jit
def place_in_column(k, P: tl.constexpr, BITS: tl.constexpr):
    """Which of P numbers stands in place k of `in_columns`."""
    C: tl.constexpr = codes_of(BITS)
    return k % (P // C) * C + k // (P // C)


@triton.jit
def _looked_up_of_four(words, DTYPE: tl.constexpr):
    """Twice four levels of each word, in two new dimensions; two words at a time, which are neighbours in a thread."""
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        _FOUR_HALF if tl.float16 == DTYPE else _FOUR_BFLOAT, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], dtype=_EIGHT,
        is_pure=True, pack=2,
    )  # fmt: skip
    low, high = tl.join(tl.join(a, c), tl.join(b, d)), tl.join(tl.join(e, g), tl.join(f, h))
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def _looked_up_of_two(words, DTYPE: tl.constexpr):
    """The same of sixteen codes: twice eight levels, in three new dimensions."""
    a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p = tl.inline_asm_elementwise(  # noqa: E741
        _TWO_HALF if tl.float16 == DTYPE else _TWO_BFLOAT, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r",
        [words], dtype=_SIXTEEN, is_pure=True, pack=2,
    )  # fmt: skip
    low = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    high = tl.join(tl.join(tl.join(i, m), tl.join(k, o)), tl.join(tl.join(j, n), tl.join(l, p)))
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def _spread(x, BITS: tl.constexpr):
    """Each word shifted by 0, 1, 2, … codes, in new dimensions."""
    if BITS == 2:
        x = tl.join(x, x >> 16)
    x = tl.join(x, x >> (12 if BITS == 3 else 4 * BITS if BITS == 4 else 8))
    x = tl.join(x, x >> (6 if BITS == 3 else 2 * BITS if BITS == 4 else 4))
    return tl.join(x, x >> BITS)

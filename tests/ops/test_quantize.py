"""Codes of vectors: what they keep, what they err by, and the bytes they take."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from golden import relative_error

import ahn
from ahn.ops.quantize import EDGES, LEVELS, code_bytes, decode, encode, per_group, rotate

BITS = (2, 3, 4)
ERRORS = {2: 0.11748, 3: 0.034548, 4: 0.0095010}
"""Mean squared errors of the best 4, 8 and 16 levels for a standard normal number (Max 1960, table 1)."""


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_best_for_a_normal_number(bits: int) -> None:
    """Each level is the mean of the numbers between its edges, each edge in the middle between two levels."""
    edges = [-math.inf, *EDGES[bits], math.inf]
    assert len(LEVELS[bits]) == 2**bits
    shares = [below(b) - below(a) for a, b in pairwise(edges)]
    means = [(density(a) - density(b)) / share for (a, b), share in zip(pairwise(edges), shares, strict=True)]
    assert means == pytest.approx(LEVELS[bits], abs=1e-6)
    assert [(a + b) / 2 for a, b in pairwise(LEVELS[bits])] == pytest.approx(EDGES[bits])
    error = 1 - sum(level**2 * share for level, share in zip(LEVELS[bits], shares, strict=True))
    assert error == pytest.approx(ERRORS[bits], rel=1e-4)


@pytest.mark.parametrize("head_dim", [4, 12, 64, 96, 128])
def test_two_bits_survive_packing(head_dim: int) -> None:
    """Every vector that two bits can say is encoded without loss (but for the scale's bfloat16)."""
    levels = torch.randint(0, 256, (50, 3, head_dim // 4), dtype=torch.uint8)
    x = decode(levels, torch.rand(50, 3).add(0.5).bfloat16(), torch.float64)
    # A short vector of few inner or outer levels has a deviation that carries some over an edge; a long one never has.
    codes, scale = encode(x, unbiased=False)
    again = decode(codes, scale, torch.float64)
    same = (codes == levels).all(-1)
    assert same.float().mean() > 0.8 if head_dim < 64 else bool(same.all())
    assert relative_error(again[same], x[same]) < 2**-8


@pytest.mark.parametrize(("bits", "numbers", "expected"), [(2, 12, 3), (3, 8, 3), (3, 64, 24), (4, 2, 1), (4, 64, 32)])
def test_codes_take_no_byte_more_than_their_bits(bits: int, numbers: int, expected: int) -> None:
    codes, scale = encode(torch.randn(3, numbers), unbiased=True, bits=bits)
    assert codes.shape == (3, expected) and codes.dtype == torch.uint8 and code_bytes(numbers, bits) == expected
    assert scale.shape == (3,) and scale.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_bytes_hold_the_first_number_lowest(bits: int) -> None:
    """The bytes of a vector as one number, little-endian, are its codes one after the other."""
    x = torch.randn(5, 24, dtype=torch.float64)
    codes, scale = encode(x, unbiased=False, bits=bits)
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)
    expected = torch.empty_like(x)
    for row, packed in enumerate(codes.tolist()):
        word = int.from_bytes(bytes(packed), "little")
        numbers = [word >> bits * i & 2**bits - 1 for i in range(24)]
        expected[row] = levels[numbers] * scale[row]
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    while len(hadamard) < 8:  # the largest power of two in 24
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / 2**0.5
    found = decode(codes, scale, torch.float64, bits)
    assert torch.allclose(found, (expected.view(5, 3, 8) @ hadamard).view(5, 24), atol=1e-12)


def error_on_a_sphere(bits: int, size: int) -> float:
    """Mean squared error of the levels for one number of a vector of `size` numbers whose deviation is exactly 1.

    Its density is that of one coordinate of a point on a sphere, a little narrower than a normal one.
    """
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1] * min(size**0.5, 8)
    weight = (1 - x * x / size).pow((size - 3) / 2)
    level = torch.tensor(LEVELS[bits], dtype=torch.float64)[torch.bucketize(x, torch.tensor(EDGES[bits]).double())]
    return float(((x - level).square() * weight).sum() / weight.sum())


@pytest.mark.sample(4)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 1024])
@pytest.mark.parametrize("bits", BITS)
def test_errors_are_those_of_the_best_levels(bits: int, head_dim: int) -> None:
    """The known share of the variance for the scale that errs least; unbiased products for the other.

    A scale of its own for each vector takes away some of the error, in the order of 2 of P numbers' worth. A million
    numbers tell the error to a quarter per cent, and the scale's bfloat16 adds 2⁻¹⁸ at most.
    """
    x = torch.randn(1_000_000 // head_dim, head_dim, dtype=torch.float64)
    nearest = decode(*encode(x, unbiased=False, bits=bits), torch.float64, bits)
    error, known = relative_error(nearest, x) ** 2, error_on_a_sphere(bits, head_dim)
    assert known == pytest.approx(ERRORS[bits], rel=10 / head_dim)
    assert 0.99 * known * (1 - 4 / head_dim) < error < 1.01 * known + 2**-18
    unbiased = decode(*encode(x, unbiased=True, bits=bits), torch.float64, bits)
    assert ((unbiased * x).sum(-1) / x.square().sum(-1)).mean() == pytest.approx(1, abs=1e-3)
    assert ((nearest * x).sum(-1) / x.square().sum(-1)).mean() < 1 - 0.8 * ERRORS[bits]
    q = x.roll(1, 0) + 0.3 * x
    slope = (q * unbiased).sum(-1) @ (q * x).sum(-1) / (q * x).sum(-1).square().sum()
    assert slope == pytest.approx(1, abs=0.02)


def test_vectors_of_zeros() -> None:
    for bits in BITS:
        for unbiased in (True, False):
            found = decode(*encode(torch.zeros(2, 64), unbiased, bits), torch.float32, bits)
            assert torch.equal(found, torch.zeros(2, 64))


@pytest.mark.parametrize("bits", BITS)
def test_a_token_is_encoded_alike_wherever_it_stands(bits: int) -> None:
    x = torch.randn(2, 3, 17, 64, dtype=torch.float64)
    codes, scale = encode(x, unbiased=True, bits=bits)
    alone = [encode(x[:, :, i : i + 1], unbiased=True, bits=bits) for i in range(17)]
    assert torch.equal(codes, torch.cat([c for c, _ in alone], 2))
    assert torch.equal(scale, torch.cat([s for _, s in alone], 2))


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_other_bits_are_refused(bits: int) -> None:
    for call in (
        lambda: encode(torch.randn(2, 64), True, bits),
        lambda: decode(torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2).bfloat16(), torch.float32, bits),
        lambda: per_group(bits),
    ):
        with pytest.raises(ahn.AHNError, match="2, 3, 4 bits per number"):
            call()


@pytest.mark.parametrize("head_dim", [48, 128, 512, 1024])
def test_compiled_code_rotates_alike(head_dim: int) -> None:
    """It works the matrix out instead of reading it."""
    x = torch.randn(3, head_dim, dtype=torch.float64)
    found = torch.compile(rotate, backend="eager", dynamic=False, fullgraph=True)(x)
    assert relative_error(found, rotate(x)) < 1e-14

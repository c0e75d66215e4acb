"""Two-bit codes of vectors: what they keep, and what they err by."""

from __future__ import annotations

import pytest
import torch
from golden import relative_error

from ahn.ops.quantize import decode, encode


@pytest.mark.parametrize("head_dim", [4, 12, 64, 96, 128])
def test_codes_survive_packing(head_dim: int) -> None:
    """Every vector that codes can say is encoded without loss (but for the scale's bfloat16)."""
    levels = torch.randint(0, 256, (50, 3, head_dim // 4), dtype=torch.uint8)
    x = decode(levels, torch.rand(50, 3).add(0.5).bfloat16(), torch.float64)
    # A short vector of few inner or outer levels has a deviation that carries some over an edge; a long one never has.
    codes, scale = encode(x, unbiased=False)
    again = decode(codes, scale, torch.float64)
    same = (codes == levels).all(-1)
    assert same.float().mean() > 0.8 if head_dim < 64 else bool(same.all())
    assert relative_error(again[same], x[same]) < 2**-8


@pytest.mark.parametrize("head_dim", [64, 96, 128, 1024])
def test_errors_are_those_of_the_best_four_levels(head_dim: int) -> None:
    """0.1175 of the variance (Max 1960) for the scale that errs least; unbiased products for the other.

    A scale of its own for each vector takes some of the error away, in the order of 2 of P numbers' worth.
    """
    x = torch.randn(4000, head_dim, dtype=torch.float64)
    nearest = decode(*encode(x, unbiased=False), torch.float64)
    error = relative_error(nearest, x) ** 2
    assert 0.1175 * (1 - 4 / head_dim) < error < 0.1175 * 1.01
    unbiased = decode(*encode(x, unbiased=True), torch.float64)
    assert ((unbiased * x).sum(-1) / x.square().sum(-1)).mean() == pytest.approx(1, abs=1e-3)
    assert ((nearest * x).sum(-1) / x.square().sum(-1)).mean() < 0.9
    q = x.roll(1, 0) + 0.3 * x
    slope = (q * unbiased).sum(-1) @ (q * x).sum(-1) / (q * x).sum(-1).square().sum()
    assert slope == pytest.approx(1, abs=0.02)


def test_vectors_of_zeros() -> None:
    for unbiased in (True, False):
        assert torch.equal(decode(*encode(torch.zeros(2, 64), unbiased), torch.float32), torch.zeros(2, 64))


def test_a_token_is_encoded_alike_wherever_it_stands() -> None:
    x = torch.randn(2, 3, 17, 64, dtype=torch.float64)
    codes, scale = encode(x, unbiased=True)
    alone = [encode(x[:, :, i : i + 1], unbiased=True) for i in range(17)]
    assert torch.equal(codes, torch.cat([c for c, _ in alone], 2))
    assert torch.equal(scale, torch.cat([s for _, s in alone], 2))

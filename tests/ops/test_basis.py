"""Keys coded in a calibrated basis: against a plain form, what they err by, and the bytes they take."""

from __future__ import annotations

import pytest
import torch
from golden import relative_error
from torch import Tensor

from ahn.ops.basis import BITS, COARSE, FINE, SIZES, Basis
from ahn.ops.quantize import LEVELS, code_bytes, decode, encode

ERRORS = {4: 0.0095010, 2: 0.11748, 0: 1.0}
"""Mean squared errors of the best levels for a standard normal number (Max 1960, table 1), and of no code."""


def drawn(heads: int, P: int, spread: float = 1.0) -> Basis:
    """A basis whose directions are not orthogonal, with deviations that fall from 1 by a factor exp(spread)."""
    weight = torch.randn(heads, P, P, dtype=torch.float64) + 3 * torch.eye(P, dtype=torch.float64)
    deviations = torch.linspace(0, -spread, P, dtype=torch.float64).exp().expand(heads, P)
    return Basis.of(weight, deviations)


def allotment(P: int) -> list[int]:
    """Bits of each direction; twice as many as there are directions."""
    first = 5 * P // 32 * 2
    bits = [FINE] * first + [COARSE] * (P - 2 * first) + [0] * first
    assert sum(bits) == BITS * P
    return bits


def plain(k: Tensor, weight: Tensor, deviations: Tensor) -> Tensor:
    """What is left of one key (P,), number by number."""
    y, bits = weight @ k, allotment(len(k))
    z = y / deviations
    own = z[: len(k) - bits.count(0)].square().mean().sqrt()
    tried = []
    for size in SIZES:
        kept = torch.zeros_like(y)
        for n, count in enumerate(bits):
            if count:
                levels = torch.tensor(LEVELS[count], dtype=k.dtype)
                kept[n] = deviations[n] * levels[(z[n] / (size * own) - levels).abs().argmin()]
        tried.append(kept)
    kept = min(tried, key=lambda kept: (y - (y @ kept) / (kept @ kept) * kept).square().sum().item())
    scale = (y @ y / (y @ kept)).bfloat16().to(k.dtype)
    return torch.linalg.solve(weight, scale * kept)


@pytest.mark.parametrize("P", [4, 8, 12, 64, 80, 96])
def test_it_is_the_plain_form(P: int) -> None:
    basis, x = drawn(2, P), torch.randn(2, 2, 3, P, dtype=torch.float64)
    codes, scales = basis.encode(x)
    assert codes.shape == (2, 2, 3, P // 4) == (2, 2, 3, code_bytes(P, BITS)) and codes.dtype == torch.uint8
    assert scales.shape == (2, 2, 3) and scales.dtype == torch.bfloat16
    found = basis.decode(codes, scales, torch.float64)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, (2, 2, 3))).tolist():
        expected = plain(x[b, h, n], basis.analysis[h], basis.deviations[h])
        assert relative_error(found[b, h, n], expected) < 1e-10  # a solution and an inverse, of condition 1000 at most


def test_a_key_has_the_same_codes_in_any_company() -> None:
    basis, x = drawn(2, 64), torch.randn(1, 2, 40, 64, dtype=torch.float64)
    codes, scales = basis.encode(x)
    alone = [basis.encode(x[:, :, n : n + 1]) for n in range(40)]
    assert torch.equal(codes, torch.cat([one[0] for one in alone], dim=2))
    assert torch.equal(scales, torch.cat([one[1] for one in alone], dim=2))


def test_nothing_is_nothing() -> None:
    basis = drawn(2, 16)
    assert not basis.decode(*basis.encode(torch.zeros(1, 2, 3, 16)), torch.float32).any()


def test_it_errs_less_where_keys_differ_by_direction() -> None:
    """By how much follows from the variances: with λ falling by e^-6 over the directions, and bits where they are."""
    P, count, spread = 64, 4000, 3.0
    basis = drawn(1, P, spread)
    z = torch.randn(1, 1, count, P, dtype=torch.float64)
    y = z * basis.deviations[:, None]
    x = y @ torch.linalg.inv(basis.analysis).mT
    variances = basis.deviations[0].square()
    left = [v * ERRORS[b] for v, b in zip(variances.tolist(), allotment(P), strict=True)]
    expected = sum(left) / variances.sum().item()
    error = (basis.decode(*basis.encode(x), torch.float64) - x) @ basis.analysis.mT
    found = (error.square().sum() / y.square().sum()).item()
    # `expected` is without a key's own size, which the search can only better; the scale that leaves products right on
    # average is 1 / (1 - e) of the best, which adds e² / (1 - e) to an error e; of 4 000 keys the mean is right to 1 %.
    assert 0.5 * expected < found < 1.02 * (expected + expected**2 / (1 - expected))
    # Two bits for every number err by e₂ / (1 - e₂), whatever the metric: the rotation spreads errors evenly. Its own
    # directions are in no order here, so that a metric with few of them has a mean right to 10 %.
    uniform = (decode(*encode(x, True), torch.float64) - x) @ basis.analysis.mT
    factor = expected / (1 - expected) * (1 - ERRORS[2]) / ERRORS[2]
    assert factor < 0.3 and found < 1.1 * factor * (uniform.square().sum() / y.square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_it_alone(dtype: torch.dtype) -> None:
    basis, x = drawn(2, 16), torch.randn(1, 2, 5, 16, dtype=dtype)
    basis = Basis(*(y.float() for y in (basis.analysis, basis.deviations, basis.synthesis)))
    codes, scales = basis.encode(x)
    expected = basis.decode(codes, scales, dtype)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = basis.encode(x)
        assert torch.equal(again[0], codes) and torch.equal(basis.decode(*again, dtype), expected)

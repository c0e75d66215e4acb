"""The benchmark of products in 8 bits multiplies what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from golden import relative_error
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

from float8 import Float8Linear


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_8_bits_is_near_the_plain_one(bias: bool) -> None:
    plain = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    x[0, 0] *= 1000  # each token has a scale of its own
    found = Float8Linear(plain)(x)
    for token, expected in zip(found.flatten(0, 1), plain(x).flatten(0, 1), strict=True):
        # Four bits of precision: a number is off by 2^-4 of itself at most, a product by twice as much.
        assert 0 < relative_error(token, expected) < 2**-3

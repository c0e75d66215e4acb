"""One row times a matrix: the kernel against a plain product, and `linear` against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from test_step import DEVICE

from ahn.ops import vector


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (7, 33), (64, 100), (130, 257)])
def test_the_kernel_is_the_product(rows: int, features: int) -> None:
    from ahn.ops import vector_triton

    x, weight = torch.randn(features, device=DEVICE), torch.randn(rows, features, device=DEVICE)
    found = vector_triton.product(x, weight, rows=4, features=64)
    # Float32: a sum of up to 257 terms in another order.
    assert relative_error(found.cpu(), (weight.double() @ x.double()).cpu()) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (2, 1, 24), (1, 3, 24), (1, 1, vector.LONG + 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_torchs(shape: tuple[int, ...], biased: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(5, shape[-1])
    bias = torch.randn(5) if biased else None
    assert relative_error(vector.linear(x, weight, bias), F.linear(x, weight, bias)) < 1e-5

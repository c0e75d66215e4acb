"""Attention with a mask over few keys: against torch's, and what it says of queries that see nothing."""

from __future__ import annotations

import pytest
import torch
from golden import relative_error

from ahn.attend import masked, merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("first", [0, 4], ids=lambda first: f"{first} seen by all")
@torch.no_grad()
def test_it_is_torchs_attention(
    dtype: torch.dtype, shape: tuple[int, int], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "QUERIES", 5)
    query = torch.randn(2, 6, 13, 8, dtype=dtype)
    key, value = (torch.randn(2, 3, 11, 8, dtype=dtype) for _ in range(2))
    visible = torch.rand(*shape, 13, 11) < 0.4
    visible[:, :, 3] = False
    visible[..., :first] = True
    found = merge.joined(masked.parts(query, key, value, visible[..., first:], 0.7))
    exact = [x.double().repeat_interleave(2, 1) for x in (key, value)]
    seen = visible.expand(2, 3, -1, -1).repeat_interleave(2, 1)
    scores = (query.double() @ exact[0].mT * 0.7).masked_fill(~seen, -torch.inf)
    some = seen.any(-1)
    out = scores.softmax(-1).nan_to_num() @ exact[1]
    unit = 2e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(found.out[some].double(), out[some]) < 8 * unit
    assert relative_error(found.score[some].double(), scores.logsumexp(-1)[some]) < 8 * unit
    assert found.score.dtype == torch.promote_types(dtype, torch.float32) and (found.score[~some] < -1e29).all()
    assert torch.isfinite(found.out).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
@torch.no_grad()
def test_written_out_as_on_a_gpu_it_is_the_same(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The last query sees none."""
    query = torch.randn(2, 6, 13, 8, dtype=dtype)
    key, value = (torch.randn(2, 3, 11, 8, dtype=dtype) for _ in range(2))
    visible = torch.rand(*shape, 13, 11) < 0.4
    visible[..., :12, 2], visible[..., 12, :] = True, False
    found = masked.written_out(query, key, value, visible, 0.7)
    (expected,) = masked.parts(query, key, value, visible, 0.7)
    unit = 2**-8 if dtype == torch.bfloat16 else 2e-7  # weights are rounded as well
    assert relative_error(found.out[:, :, :12], expected.out[:, :, :12]) < 8 * unit
    assert relative_error(found.score[:, :, :12], expected.score[:, :, :12]) < 8 * unit
    assert (found.score[:, :, 12] < -1e29).all() and torch.isfinite(found.out).all()


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 4])
def test_no_key_to_choose_from(first: int) -> None:
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 3, first, 8)
    found = merge.joined(masked.parts(query, key, key, torch.ones(1, 1, 5, 0, dtype=torch.bool), 0.7))
    if first:
        repeated = key.repeat_interleave(2, 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, repeated, repeated, scale=0.7)
        assert relative_error(found.out, wanted) < 1e-6
    else:
        assert (found.out == 0).all() and (found.score < -1e29).all()

"""Copies of wide elements are the copies of torch, to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ahn.layout import copies, slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN included."""
    assert a.dtype == b.dtype
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@given(st.data())
@settings(max_examples=60)
def test_join_and_take(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    B, H, P = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 8, 16]))

    def part() -> Tensor:
        tokens = data.draw(st.integers(0, 5))
        if data.draw(st.booleans()):  # a slice of the cache
            first = data.draw(st.integers(0, 2))
            x = torch.randn(B, H, tokens + 2, P, device=DEVICE).to(dtype)[:, :, first : first + tokens]
        else:  # as the model makes keys
            x = torch.randn(B, tokens, H, P, device=DEVICE).to(dtype).transpose(1, 2)
        return x.masked_fill_(torch.rand(x.shape, device=DEVICE) < 0.1, torch.nan)

    parts = [part() for _ in range(data.draw(st.integers(1, 3)))]
    assert same_bits(copies.join(parts), torch.cat(parts, dim=2))
    x = parts[0]
    tokens = torch.randint(max(1, x.shape[2]), (data.draw(st.integers(0, 6)) if x.shape[2] else 0,), device=DEVICE)
    assert same_bits(copies.take(x, tokens), x.index_select(2, tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_wide(dtype: torch.dtype) -> None:
    """Keys of every model with heads of 8 numbers or more; nothing unaligned, nothing that wants gradients."""
    x = torch.randn(2, 9, 3, 8).to(dtype).transpose(1, 2)
    assert copies._fits(x) and copies._fits(x[:, :, 2:5]) and copies._fits(x[:, :, :0])
    assert not copies._fits(x[..., 0]) and not copies._fits(x[..., :5]) and not copies._fits(x[..., 1:])
    assert not copies._fits(x.transpose(2, 3))
    assert not copies._fits(torch.randn(73).to(dtype)[1:].view(1, 1, 9, 8))
    leaf = torch.randn(1, 1, 2, 8).to(dtype).requires_grad_()
    copies.join([leaf, copies.take(leaf, torch.arange(2))]).sum().backward()
    assert leaf.grad is not None and bool((leaf.grad == 2).all())


def test_types_are_promoted_as_by_torch() -> None:
    a, b = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 3, 8).bfloat16()
    assert torch.equal(copies.join([a, b]), torch.cat([a, b], dim=2))


def test_a_window_is_laid_out_in_wide_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """From columns into slots and back, for whoever goes on from a kept conversation."""
    seen, read, wide = 200, torch.tensor([200]), []
    monkeypatch.setattr(slots, "take", lambda x, tokens: (wide.append(copies._fits(x)), copies.take(x, tokens))[1])
    ring = slots.Slots(64, 8)
    columns = torch.randn(1, 2, 72, 8).bfloat16()
    laid = ring.from_columns(columns, seen, read)
    assert same_bits(ring.to_columns(laid, seen, read), columns) and wide == [True, True]

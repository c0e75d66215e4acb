"""A rectangle and two triangles are the window: against the mask that `Visibility` writes out."""

from __future__ import annotations

import pytest
import torch
from golden import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from ahn.attend import masked, merge, windowed
from ahn.layout.visibility import Visibility

# Float32: sums of up to a hundred terms in another order.
FLOAT32 = 1e-5


@given(st.data())
@settings(max_examples=80)
def test_bands_are_the_mask(data: st.DataObject) -> None:
    window, sinks = data.draw(st.integers(3, 20)), data.draw(st.integers(0, 5))
    if data.draw(st.booleans()):
        seen, n = sinks + window + data.draw(st.integers(0, 9)), data.draw(st.integers(2, 45))
    else:
        n = data.draw(st.integers(2, sinks + window - 1))
        seen = data.draw(st.integers(1, sinks + window - n))
    view = Visibility(window, sinks, seen, n, torch.device("cpu"))
    query = torch.randn(2, 4, n, 8)
    keys, values = (torch.randn(2, 2, view.cached + n, 8) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, view.mask, scale=0.3, enable_gqa=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windowed, "kernel", lambda query: windowed.plain)
        found = windowed.attend(query, keys, values, view, 0.3)
    assert relative_error(found, expected) < FLOAT32


def test_parts_of_other_keys_are_joined_to_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of nine queries, and two more sets of keys, one of which the first queries do not see."""
    view = Visibility(10, 2, 30, 40, torch.device("cpu"))
    query = torch.randn(2, 4, 40, 8)
    keys, values = (torch.randn(2, 2, view.cached + 40, 8) for _ in range(2))
    others = [torch.randn(2, 2, 7, 8) for _ in range(4)]
    masks = [torch.rand(1, 2, 40, 7) < 0.5, torch.rand(2, 2, 40, 7) < 0.5]
    masks[1][:, :, :20] = False
    monkeypatch.setattr(masked, "QUERIES", 16)
    pairs = zip((others[:2], others[2:]), masks, strict=True)
    parts = [part for pair, seen in pairs for part in masked.parts(query, *pair, seen, 0.3)]
    found = windowed.attend(query, keys, values, view, 0.3, [], parts)
    mask = torch.cat([x.expand(2, 2, -1, -1) for x in (view.mask, *masks)], 3).repeat_interleave(2, 1)
    both = (keys, *others[::2]), (values, *others[1::2])
    every = (torch.cat(x, 2).repeat_interleave(2, 1) for x in both)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *every, mask, scale=0.3)
    assert relative_error(found, expected) < FLOAT32


def test_parts_of_float64_are_joined_in_float64() -> None:
    view = Visibility(10, 2, 30, 40, torch.device("cpu"))
    query = torch.randn(2, 4, 40, 8, dtype=torch.float64)
    keys, values = (torch.randn(2, 2, view.cached + 40, 8, dtype=torch.float64) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, view.mask, scale=0.3, enable_gqa=True
    )
    assert relative_error(windowed.attend(query, keys, values, view, 0.3), expected) < 1e-13


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("count", [2, 3])
@given(data=st.data())
@settings(max_examples=10)
def test_the_merge_kernel_is_the_plain_merge(count: int, data: st.DataObject) -> None:
    from ahn.attend import merge_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, H, n = (data.draw(st.integers(1, most)) for most in (2, 3, 40))
    P = data.draw(st.sampled_from([16, 24]))
    parts = []
    for own in range(count):
        m = data.draw(st.integers(1, n)) if own else n
        out = torch.randn(B, n, H, P, device=device).transpose(1, 2)  # as cuDNN lays it out
        score = 5 * torch.randn(B, H, n, device=device)
        parts.append(merge.Part(out[:, :, :m], score[:, :, :m], data.draw(st.booleans())))
    assert relative_error(merge_kernel.merge(parts).cpu(), merge.plain(parts).cpu()) < FLOAT32

"""How exact attention is computed: chosen once per forward, and again only for layers that are not alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FEW, adapted, awaken, base, tokens

import ahn
from ahn.model import context, route


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The routes that were chosen, by the names of their classes."""
    names: list[str] = []

    def choose(*arguments: Any) -> route.Route:
        found = route.choose(*arguments)
        names.append(type(found).__name__)
        return found

    monkeypatch.setattr(context, "choose", choose)
    return names


@pytest.mark.parametrize(
    ("quantized", "lengths", "expected"),
    [
        (0, [8, 5, 1, 1], ["Masked", "Windowed", "Masked", "Masked"]),
        (0, [20], ["Masked", "Windowed"]),  # read in two pieces: up to the window, and the rest
        (5, [8, 9, 1], ["Masked", "Windowed", "WholeTier"]),
        (5, [8, 1], ["Masked", "Masked"]),  # the tier is not full
    ],
)
@torch.no_grad()
def test_once_per_forward(quantized: int, lengths: list[int], expected: list[str], chosen: list[str]) -> None:
    """Within the window, in chunks after it, and token by token."""
    model = adapted(window=6, sinks=2, quantized=quantized, prefill_chunk_size=100)
    assert len(model.get_decoder().layers) > 1
    cache = ahn.AHNCache.for_model(model)
    for length in lengths:
        model(tokens(1, length), past_key_values=cache)
    assert chosen == expected


@torch.no_grad()
def test_layers_that_are_not_alike_choose_for_themselves(chosen: list[str]) -> None:
    """The last layer wants scores that only the base model's kernel knows."""
    model = adapted(window=6, sinks=2, prefill_chunk_size=100)
    cache = ahn.AHNCache.for_model(model)
    model(tokens(1, 8), past_key_values=cache)
    layer = model.get_decoder().layers[-1].self_attn
    chosen.clear()

    def own_scores(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"s_aux": torch.zeros(4)}

    handle = layer.register_forward_pre_hook(own_scores, with_kwargs=True)
    model(tokens(1, 5), past_key_values=cache)
    handle.remove()
    assert chosen == ["Windowed", "Masked"]


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_some_queries_at_a_time_where_heads_have_masks_of_their_own(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = awaken(ahn.attach(base(attn_implementation=kernel), ahn.AHNConfig("retained", 6, 2, **FEW)))
    ids = tokens(2, 40)
    expected = model(ids).logits
    monkeypatch.setattr("ahn.model.route.QUERIES", 7)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)

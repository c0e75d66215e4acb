"""How exact attention is computed: chosen once per forward, and again only for layers that are not alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from golden import relative_error
from models import FEW, adapted, awaken, base, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ahn
from ahn.attend import spans, windowed
from ahn.attend.part import Part
from ahn.attend.spans_blocks import Columns
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


SHORT = {
    "window": {"memory": "window_only"},
    "a memory that adds": {"memory": "deltanet"},
    "pooled": {"memory": "ct_avg"},
    "tier": {"memory": "window_only", "quantized": 40, "max_distance": 64},
    "narrow tier": {"memory": "window_only", "quantized": 9},
    "retained": {"memory": "retained", "slots": 16, "key_bits": 16, "value_bits": 16, "max_distance": 64},
    "retained, coded": {"memory": "retained", "slots": 24, "max_distance": 64},
    "tier, retained": {"memory": "retained", "slots": 24, "quantized": 9, "max_distance": 64},
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("lengths", [[130], [5, 7, 40, 1, 1, 64, 12]], ids=len)
@torch.no_grad()
def test_short_windows_by_spans(
    kind: str, lengths: list[int], chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU chooses, in plain torch, over several moves of the anchors: as with masks over everything."""
    model = adapted(window=6, sinks=2, prefill_chunk_size=50, **SHORT[kind])
    ids, found = tokens(2, sum(lengths)), {}
    for name in ("Masked", "Windowed", "Spanned"):
        with monkeypatch.context() as patch:
            if name == "Masked":
                patch.setattr(windowed, "applies", lambda view, query: False)
            if name == "Spanned":
                patch.setattr(spans, "supported", lambda query: not torch.is_grad_enabled())
                patch.setattr(spans, "part", plain_part)
            chosen.clear()
            cache = ahn.AHNCache.for_model(model)
            found[name] = torch.cat([model(x, past_key_values=cache).logits for x in ids.split(lengths, 1)], 1)
            assert name in chosen and {"Windowed", "Spanned"} - {name} - set(chosen)
    # A scale of the tier may be rounded to the other side.
    tolerance = 2e-3 if "tier" in kind else 1e-4
    assert relative_error(found["Spanned"], found["Masked"]) < tolerance
    assert relative_error(found["Windowed"], found["Masked"]) < tolerance


def plain_part(query: Tensor, key: Tensor, value: Tensor, columns: Columns, scaling: float) -> Part:
    """As where there are no kernels."""
    return spans.plain_part(query, key, value, columns.until, scaling)


class Waits(TorchDispatchMode):
    """Counts what makes a CPU wait for a GPU: numbers that are asked for, and places that are looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.name()] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["tier", "retained, coded"])
@torch.no_grad()
def test_nobody_waits_for_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no layer and chunk, nor when steps begin; constants are made once."""
    monkeypatch.setattr(spans, "supported", lambda query: not torch.is_grad_enabled())
    monkeypatch.setattr(spans, "part", plain_part)
    model = adapted(window=6, sinks=2, prefill_chunk_size=50, **SHORT[kind])
    model(tokens(1, 150))
    cache = ahn.AHNCache.for_model(model)
    with Waits() as waits:
        for length in (100, 50, 1, 1, 30):
            model(tokens(1, length), past_key_values=cache)
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"}
    assert not waiting & set(waits.found)


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

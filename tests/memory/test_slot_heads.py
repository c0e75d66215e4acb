"""Only some key heads keep tokens: what the others see, and that everything else goes on as with all heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapted, base, read, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import costs
from ahn.attend.masked import of_all_keys
from ahn.errors import AHNError
from ahn.memory.retained_tokens import RetainedTokens

SOME = ((0, 1), (2, 0), (2, 1))
SHAPE: dict[str, Any] = {"memory": "retained", "window": 9, "sinks": 2, "slots": 24, "prefill_chunk_size": 16}
FORMS: dict[str, dict[str, Any]] = {
    "exact": {"key_bits": 16, "value_bits": 16},
    "codes": {"key_bits": 4, "value_bits": 2},
    "behind a tier": {"quantized": 7},
    "bounded": {"max_distance": 40},
}


def some_of(form: dict[str, Any], heads: tuple[tuple[int, int], ...] = SOME) -> PreTrainedModel:
    """With three layers of two key heads."""
    model = ahn.attach(base(num_hidden_layers=3), ahn.AHNConfig(**SHAPE | form, slot_heads=heads))
    with torch.no_grad():
        for name, parameter in sorted(ahn.adapter_parameters(model).items()):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def masked(model: PreTrainedModel, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """All heads keep tokens, with the same scores; those that should not have their keys hidden."""
    other = ahn.attach(base(num_hidden_layers=3), ahn.AHNConfig(**SHAPE | form))
    own, every = ahn.adapter_parameters(model), ahn.adapter_parameters(other)
    for layer in range(3):
        fn, heads = other.get_decoder().layers[layer].ahn.fn, [head for at, head in SOME if at == layer]
        fn.shown = torch.zeros(2, dtype=torch.bool).index_fill(0, torch.tensor(heads, dtype=torch.long), True)
        for name, parameter in every.items():
            if f"layers.{layer}." in name and name in own:
                if own[name].shape == parameter.shape:
                    parameter.data = own[name].data
                else:
                    parameter.data[heads] = own[name].data
    visible = RetainedTokens._visible

    def hidden(self: RetainedTokens, *args: Any) -> Tensor:
        found = visible(self, *args)
        shown: Tensor | None = getattr(self, "shown", None)
        # All keys: none is seen by every head.
        return found if shown is None else of_all_keys(found, args[1].shape[2]) & shown[:, None, None]

    monkeypatch.setattr(RetainedTokens, "_visible", hidden)
    return other


@pytest.mark.sample(2)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_other_heads_see_sinks_and_window_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64: a number on the edge of two codes falls to either side.
    model, ids = some_of(FORMS[form]), tokens(2, 60)
    other = masked(model, FORMS[form], monkeypatch).double()
    model.double()
    for counts in ([60], [20, 12, *[1] * 8, 20]):
        found, expected = read(model, ids, counts)[0], read(other, ids, counts)[0]
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.sample(2)
@pytest.mark.parametrize("form", [*reversed(FORMS)])
@torch.no_grad()
def test_whole_chunks_steps_and_padded_agree(form: str) -> None:
    model, ids = some_of(FORMS[form]), tokens(2, 60)
    whole = read(model, ids, [60])[0]
    tolerance = 1e-4 * whole.abs().max()
    for counts in ([7, 23, 30], [45, *[1] * 15]):
        assert (read(model, ids, counts)[0] - whole).abs().max() < tolerance
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(65) >= torch.tensor([[5], [5]])).long()
    assert (read(model, padded, [30, 35], mask)[0][:, 5:] - whole).abs().max() < tolerance


@torch.no_grad()
def test_all_heads_named_are_all_heads() -> None:
    named = some_of({}, tuple((layer, head) for layer in range(3) for head in range(2)))
    plain = ahn.attach(base(num_hidden_layers=3), ahn.AHNConfig(**SHAPE))
    parameters = ahn.adapter_parameters(named)
    for name, parameter in ahn.adapter_parameters(plain).items():
        parameter.data = parameters[name].data
    ids = tokens(1, 60)
    assert torch.equal(read(named, ids, [30, 30])[0], read(plain, ids, [30, 30])[0])


@torch.no_grad()
def test_bytes_are_those_of_the_heads_that_keep(tmp_path: Path) -> None:
    model = some_of({})
    cache = ahn.AHNCache.for_model(model)
    model(tokens(1, 60), past_key_values=cache)
    held = sum(x.nbytes for layer in cache.memory_layers.values() for x in layer.state.memory.values())
    few = costs.cost(base(num_hidden_layers=3).config, model.ahn_config, 60, torch.float32).ahn
    every = costs.cost(base(num_hidden_layers=3).config, model.ahn_config.replace(slot_heads=None), 60, torch.float32)
    assert held == few.state_bytes and 2 * held == every.ahn.state_bytes
    parameters = sum(p.numel() for p in ahn.adapter_parameters(model).values())
    assert costs.count_parameters(base(num_hidden_layers=3).config, model.ahn_config) == parameters


@torch.no_grad()
def test_adapters_and_conversations_are_saved_and_read(tmp_path: Path) -> None:
    model, ids = some_of(FORMS["codes"]), tokens(1, 70)
    ahn.save_adapter(model, tmp_path / "adapter")
    again = ahn.load_adapter(base(num_hidden_layers=3), tmp_path / "adapter")
    assert again.ahn_config == model.ahn_config and again.ahn_config.slot_heads == SOME
    cache = ahn.AHNCache.for_model(model)
    model(ids[:, :60], past_key_values=cache)
    cache.save(tmp_path / "talk")
    rest = model(ids[:, 60:], past_key_values=copy.deepcopy(cache)).logits
    loaded = ahn.AHNCache.load(tmp_path / "talk", again)
    assert torch.equal(again(ids[:, 60:], past_key_values=loaded).logits, rest)
    other = some_of(FORMS["codes"], ((0, 0), (1, 0), (2, 1)))
    with pytest.raises(AHNError, match="another base model or adapter"):
        ahn.AHNCache.load(tmp_path / "talk", other)


@torch.no_grad()
def test_rows_come_and_go() -> None:
    from ahn.cache import rows

    model = some_of(FORMS["codes"])
    talks = [tokens(1, length, seed) for seed, length in enumerate((8, 40, 71))]
    caches = [ahn.AHNCache.for_model(model) for _ in talks]
    for ids, cache in zip(talks, caches, strict=True):
        model(ids, past_key_values=cache)
    joined, new = rows.join(caches), tokens(3, 1, 9)
    places = torch.tensor([[ids.shape[1]] for ids in talks])
    mask = rows.mask(joined)
    found = model(new, past_key_values=joined, position_ids=places, attention_mask=mask).logits
    for row, cache in enumerate(caches):
        alone = model(new[row : row + 1], past_key_values=cache).logits
        assert (found[row] - alone[0]).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize(
    "heads", [(), ((0,),), ((0, 0), (0, 0)), ((0, -1),), ("0,1",), 3, ((0, True),), ((0, 1.0),), [[0, 0], None]]
)
def test_heads_are_checked(heads: Any) -> None:
    with pytest.raises(AHNError, match="slot_heads"):
        ahn.AHNConfig("retained", 9, 2, slot_heads=heads)


@pytest.mark.parametrize("pair", [(3, 0), (0, 2)])
def test_heads_that_a_model_lacks_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(AHNError, match="slot_heads has key head"):
        ahn.attach(base(num_hidden_layers=3), ahn.AHNConfig(**SHAPE, slot_heads=(pair,)))


def test_generation_goes_on_from_few_heads() -> None:
    model, ids = some_of(FORMS["bounded"]), tokens(1, 60)
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 65)
    assert adapted(memory="retained").ahn_config.slot_heads is None

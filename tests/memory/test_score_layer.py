"""One layer's score a token is for all heads of all layers: whatever way a text is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import awaken, base, read, tokens

import ahn
from ahn import costs
from ahn.cache import rows
from ahn.errors import AHNError
from ahn.model.observer import Observer

LAYERS, FIRST = 4, 1
SHAPE: dict[str, Any] = {"window": 9, "sinks": 2, "slots": 32, "prefill_chunk_size": 16, "passage": 2}
FORMS: dict[str, dict[str, Any]] = {
    "exact": {"key_bits": 16, "value_bits": 16},
    "codes": {"key_bits": 4, "value_bits": 2},
    "alone": {"passage": 1},
    "behind a tier": {"quantized": 7},
    "bounded": {"max_distance": 40},
}


def scored(form: str = "codes", first: int = FIRST, architecture: str = "qwen3", layers: int = LAYERS) -> Any:
    """In float64: a number on the edge of two codes falls to either side."""
    config = ahn.AHNConfig("retained", **SHAPE | FORMS[form], score_layer=first)
    return awaken(ahn.attach(base(architecture, num_hidden_layers=layers), config)).double()


@pytest.mark.sample(2)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_whole_chunks_steps_and_padded_agree(form: str) -> None:
    model, ids = scored(form), tokens(2, 60)
    whole, _ = read(model, ids, [60])
    tolerance = 1e-4 * whole.abs().max()
    for counts in ([7, 23, 30], [45, *[1] * 15]):
        assert (read(model, ids, counts)[0] - whole).abs().max() < tolerance
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(65) >= torch.tensor([[5], [5]])).long()
    assert (read(model, padded, [30, 35], mask)[0][:, 5:] - whole).abs().max() < tolerance


@pytest.mark.parametrize("first", [None, FIRST])
@torch.no_grad()
def test_a_padded_chunk_is_read_at_once_wherever_far_tokens_move(first: int | None) -> None:
    """Each row sees its far tokens move every 16 tokens, at a column of its own; a chunk has 9 of them, or 16."""
    config = ahn.AHNConfig("retained", **SHAPE, max_distance=256, score_layer=first)
    model = awaken(ahn.attach(base(num_hidden_layers=2), config)).double()
    rows = [tokens(1, length, seed)[0] for seed, length in enumerate((120, 113, 107))]
    alone = [read(model, row[None], [len(row)])[0][0] for row in rows]
    mask = torch.stack([torch.arange(120) >= 120 - len(row) for row in rows]).long()
    ids = torch.stack([torch.nn.functional.pad(row, (120 - len(row), 0)) for row in rows])
    forwards: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    together, _ = read(model, ids, [120], mask)
    handle.remove()
    for row, found in zip(alone, together, strict=True):
        assert (found[-len(row) :] - row).abs().max() < 1e-4 * row.abs().max()
    size = 16 if first is None else 9
    assert len(forwards) == -(-11 // size) + -(-(120 - 11) // size)


@torch.no_grad()
def test_all_heads_of_all_layers_keep_the_same_tokens() -> None:
    model, ids = scored(), tokens(2, 90)
    _, cache = read(model, ids, [20, 40, *[1] * 30])
    states = [layer.state.memory for layer in cache.layers]
    kept = states[FIRST]["positions"]
    assert all(torch.equal(state["positions"], kept) for state in states)
    assert torch.equal(kept[:, 0], kept[:, 1]) and not torch.equal(kept[0], kept[1])
    # What waits is written in place, and taken by kernels, as it lies in memory.
    assert all(layer.window.gates["score"].is_contiguous() for layer in cache.layers)
    gates = [layer.ahn.fn.write_gates(torch.randn(2, 5, 32).double())["score"] for layer in model.model.layers]
    assert all(gate.is_contiguous() and gate.shape == (2, 2, 5) for gate in gates)
    names = {name.split(".fn.")[0] for name in ahn.adapter_parameters(model)}
    assert names == {f"model.layers.{FIRST}.ahn"}


@torch.no_grad()
def test_bytes_are_those_of_scores_of_all_layers() -> None:
    plain = base(num_hidden_layers=LAYERS)
    model = ahn.attach(plain, ahn.AHNConfig("retained", **SHAPE, score_layer=FIRST))
    _, cache = read(model, tokens(1, 60), [60])
    held = sum(x.nbytes for layer in cache.layers for x in layer.state.memory.values())
    own, every = (
        costs.cost(plain.config, config, 60, torch.float32).ahn
        for config in (model.ahn_config, model.ahn_config.replace(score_layer=None))
    )
    assert held == own.state_bytes and own.cache_bytes == cache.nbytes()
    assert own.state_bytes == every.state_bytes
    assert costs.count_parameters(plain.config, model.ahn_config) == sum(
        parameter.numel() for parameter in ahn.adapter_parameters(model).values()
    )
    # A baseline of the same configuration has slots in every layer.
    pooled = [costs.cost(plain.config, c.replace(memory="ct_max"), 60) for c in (model.ahn_config, ahn.AHNConfig())]
    assert (
        pooled[0].ahn.state_numbers
        == costs.cost(plain.config, model.ahn_config.replace(memory="ct_max", score_layer=None), 60).ahn.state_numbers
    )


@torch.no_grad()
def test_adapters_and_conversations_are_saved_and_read(tmp_path: Path) -> None:
    model, ids = scored().float(), tokens(1, 70)
    ahn.save_adapter(model, tmp_path / "adapter")
    again = ahn.load_adapter(base(num_hidden_layers=LAYERS), tmp_path / "adapter")
    assert again.ahn_config == model.ahn_config and again.ahn_config.score_layer == FIRST
    _, cache = read(model, ids[:, :60], [60])
    cache.save(tmp_path / "talk")
    fork = copy.deepcopy(cache)
    rest = model(ids[:, 60:], past_key_values=fork).logits
    loaded = ahn.AHNCache.load(tmp_path / "talk", again)
    assert torch.equal(again(ids[:, 60:], past_key_values=loaded).logits, rest)
    assert torch.equal(model(ids[:, 60:], past_key_values=cache).logits, rest)
    with pytest.raises(AHNError, match="another base model or adapter"):
        ahn.AHNCache.load(tmp_path / "talk", scored(first=2).float())


@torch.no_grad()
def test_rows_come_and_go() -> None:
    model = scored()
    talks = [tokens(1, length, seed) for seed, length in enumerate((8, 40, 71))]
    caches = [read(model, ids, [ids.shape[1]])[1] for ids in talks]
    joined, new = rows.join(caches), tokens(3, 1, 9)
    places = torch.tensor([[ids.shape[1]] for ids in talks])
    found = model(new, past_key_values=joined, position_ids=places, attention_mask=rows.mask(joined)).logits
    for row, cache in enumerate(caches):
        alone = model(new[row : row + 1], past_key_values=cache).logits
        assert (found[row] - alone[0]).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_guesses_that_wait_change_nothing() -> None:
    model, ids = scored("bounded"), tokens(1, 6).repeat(1, 10)
    plain = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=5), plain)


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_models_of_other_kinds(architecture: str) -> None:
    """Of Gemma 3 and GPT-OSS one layer of the two has a memory, and scores for itself."""
    first = 1 if architecture == "gemma3" else 0
    model = scored("exact", first, architecture, 2).float()
    ids = tokens(1, 70)
    whole, cache = read(model, ids, [70])
    assert cache.memory_layers[first].state.memory["positions"].max() == 70 - 10
    assert (read(model, ids, [30, *[1] * 40])[0] - whole).abs().max() < 1e-4 * whole.abs().max()


@torch.no_grad()
def test_observers_see_scores_given() -> None:
    class Watch(Observer):
        def attending(self, layer: Any, call: Any) -> None:
            seen.append(layer.index)

    from ahn.model.attached import observed

    model, seen = scored(), list[int]()
    ids = tokens(1, 60)
    plain, _ = read(model, ids, [60])
    with observed(model, Watch(), first=True):
        assert torch.equal(read(model, ids, [60])[0], plain)
    assert set(seen) == set(range(LAYERS))


@torch.no_grad()
def test_no_more_tokens_than_the_window_come_at_once() -> None:
    model, ids = scored("exact"), tokens(1, 60)
    for refused in ({"use_cache": False}, {"output_hidden_states": True}, {"labels": ids}):
        with pytest.raises(AHNError, match="60 tokens cannot be read at once: layer 1 scores"):
            model(ids, **refused)
    cache = ahn.AHNCache.for_model(model)
    first = model(ids[:, :11], past_key_values=cache, output_hidden_states=True).logits  # nothing leaves
    rest = model(ids[:, 11:20], past_key_values=cache, output_hidden_states=True).logits  # what leaves was there before
    whole, _ = read(model, ids[:, :20], [20])
    assert (torch.cat([first, rest], dim=1) - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_heads_that_keep_need_not_be_of_the_layer_that_scores(layer: int) -> None:
    heads = ((0, 1), (3, 0), (3, 1))
    config = ahn.AHNConfig("retained", **SHAPE, score_layer=layer, slot_heads=heads)
    model, ids = awaken(ahn.attach(base(num_hidden_layers=LAYERS), config)).double(), tokens(2, 70)
    whole, cache = read(model, ids, [70])
    kept = [state.state.memory.get("positions") for state in cache.layers]
    assert [None if x is None else x.shape[1] for x in kept] == [1, None, None, 2]
    assert torch.equal(kept[3], kept[0].expand(-1, 2, -1)) and not torch.equal(kept[0][0], kept[0][1])
    assert (read(model, ids, [30, 25, *[1] * 15])[0] - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("layer", [-1, "1", 1.0, True, (1,)])
def test_the_layer_is_checked(layer: Any) -> None:
    with pytest.raises(AHNError, match="score_layer must be None or a layer's index"):
        ahn.AHNConfig("retained", 9, 2, score_layer=layer)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(AHNError, match="among full_attention_layers"):
        ahn.AHNConfig("retained", 9, 2, score_layer=1, full_attention_layers=(1,))
    beyond = ahn.AHNConfig("retained", 9, 2, score_layer=LAYERS)
    for refused in (ahn.attach, lambda model, config: costs.cost(model.config, config, 60)):
        with pytest.raises(AHNError, match=r"score_layer is 4, which is no layer with a memory.* 0, 1, 2, 3\."):
            refused(base(num_hidden_layers=LAYERS), beyond)
    with pytest.raises(AHNError, match="no layer with a memory"):
        ahn.attach(base("gemma3"), ahn.AHNConfig("retained", 9, 2, score_layer=0))

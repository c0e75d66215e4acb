"""A synthetic cache is, but for its numbers, one that has read."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ahn.bench import model as bench_model
from ahn.bench.fill import random_tokens, read_cache, synthetic_cache
from ahn.bench.methods import make_methods
from ahn.cache.layer import AHNLayer
from ahn.measure.reading import bytes_of_cache

NAMES = ["full-dynamic", "full-static", "window", "gated_deltanet", "deltanet", "mamba2", "retained"]


def described(cache: Cache) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    layers = []
    for layer in cache.layers:
        own = layer.tensors() if isinstance(layer, AHNLayer) else {"keys": layer.keys, "values": layer.values}
        layers.append({name: (x.shape, x.dtype) for name, x in own.items()})
    return layers


@pytest.mark.sample(7)
@pytest.mark.parametrize("context", [17, 70])
@pytest.mark.parametrize("name", NAMES)
def test_as_if_it_had_read(model: PreTrainedModel, name: str, context: int) -> None:
    method = make_methods([name], 20, 4)[0]
    with method.on(model), method.without_gradients():
        real = read_cache(method, model, 2, context, 90)
        made = synthetic_cache(method, model, 2, context, 90)
        assert bytes_of_cache(made) == bytes_of_cache(real)
        assert described(made) == described(real)
        assert getattr(made, "rows", None) == getattr(real, "rows", None)
        ids = random_tokens(model, 2, 1)
        for _ in range(3):
            logits = model(ids, past_key_values=made).logits
        assert int(made.get_seq_length()) == context + 3
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])  # rows are filled with numbers of their own


@pytest.mark.sample(6)
@pytest.mark.parametrize("context", [17, 30, 70])
@pytest.mark.parametrize("name", ["window", "gated_deltanet", "mamba2", "retained"])
def test_with_quantized_tokens(model: PreTrainedModel, name: str, context: int) -> None:
    """Before any has left the window, before the ring is full, and after."""
    method = make_methods([name], 20, 4, quantized=14)[0]
    with method.on(model), method.without_gradients():
        real = read_cache(method, model, 2, context, 90)
        made = synthetic_cache(method, model, 2, context, 90)
        assert described(made) == described(real)
        assert bytes_of_cache(made) == bytes_of_cache(real)
        assert model_steps(model, made, rows=2) == context + 1


def test_sliding_layers_of_the_base(model: PreTrainedModel) -> None:
    config = AutoConfig.for_model(
        "gemma3_text",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=61,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )
    gemma = bench_model.build(config, torch.device("cpu"), torch.float32)
    for method in make_methods(["full-dynamic", "full-static", "mamba2"], 20, 4):
        with method.on(gemma), method.without_gradients():
            real = read_cache(method, gemma, 1, 40, 50)
            made = synthetic_cache(method, gemma, 1, 40, 50)
            assert described(made) == described(real)
            assert model_steps(gemma, made) == 41


def model_steps(model: PreTrainedModel, cache: Cache, rows: int = 1) -> int:
    assert model(random_tokens(model, rows, 1), past_key_values=cache).logits.isfinite().all()
    return int(cache.get_seq_length())


def test_gates_are_possible_ones(model: PreTrainedModel) -> None:
    """The decay of Gated DeltaNet must not be positive: a state that grows at each step would overflow."""
    method = make_methods(["gated_deltanet"], 20, 4)[0]
    with method.on(model), method.without_gradients():
        seen = read_cache(method, model, 1, 13, 13).layers[0].tensors()
        made = synthetic_cache(method, model, 2, 70, 80).layers[0].tensors()
    for name in [name for name in made if name.startswith("gates.")]:
        low, high = made[name].min(), made[name].max()
        # Another 13 tokens were sampled, from the same model: within a few spreads of what was seen here.
        room = 5 * (seen[name].max() - seen[name].min())
        assert seen[name].min() - room <= low <= high <= seen[name].max() + room
        assert made[name].unique().numel() > 4

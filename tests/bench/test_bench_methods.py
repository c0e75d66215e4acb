"""What is compared: names, the same window for all, a memory whose read counts, and a model that is bare afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

import ahn
from ahn.bench.fill import random_tokens
from ahn.bench.methods import make_methods
from ahn.errors import AHNError


def test_all_methods_by_default_with_one_window() -> None:
    methods = make_methods(None, 20, 4)
    assert [m.name for m in methods] == ["full-dynamic", "full-static", "window", *ahn.memory.names()]
    assert {m.config.lossless for m in methods if m.config} == {24}
    assert [m.name for m in methods if m.trainable] == list(ahn.memory.names())


def test_unknown_name() -> None:
    with pytest.raises(AHNError, match=r"'fulll'.*full-dynamic"):
        make_methods(["fulll"], 20, 4)


def test_an_adapter_gives_weights_to_its_own_memory(model: PreTrainedModel, tmp_path: Path) -> None:
    ahn.save_adapter(ahn.attach(model, ahn.AHNConfig("mamba2", window=24, sinks=8)), tmp_path)
    parameters = {name: p.detach().clone() for name, p in ahn.adapter_parameters(model).items()}
    ahn.detach(model)
    methods = make_methods(None, None, None, str(tmp_path))
    assert [m.name for m in methods] == ["full-dynamic", "full-static", "window", "mamba2"]
    assert all(m.config.lossless == 32 for m in methods if m.config)
    with methods[-1].on(model):
        found = ahn.adapter_parameters(model)
        assert all(torch.equal(found[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize("memory", ahn.memory.names())
def test_the_read_counts_and_the_model_is_bare_afterwards(model: PreTrainedModel, memory: str) -> None:
    before = list(model.state_dict())
    ids, outputs = random_tokens(model, 1, 40), []
    for method in make_methods(["window", memory], 20, 4):
        with method.on(model), method.without_gradients():
            outputs.append(model(ids).logits[:, -1])
    assert not torch.allclose(*outputs, rtol=1e-5)
    assert list(model.state_dict()) == before


def test_memories_run_in_the_models_precision_and_train_in_float32(model: PreTrainedModel) -> None:
    model = model.bfloat16()
    method = make_methods(["gated_deltanet"], 20, 4)[0]
    for training, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        with method.on(model, training=training):
            assert {p.dtype for p in ahn.adapter_parameters(model).values()} == {dtype}


def test_caches(model: PreTrainedModel) -> None:
    dynamic, static, window = make_methods(["full-dynamic", "full-static", "window"], 20, 4)
    assert isinstance(dynamic.new_cache(model, 2, 10), DynamicCache)
    assert isinstance(static.new_cache(model, 2, 10), StaticCache)
    with window.on(model):
        assert isinstance(window.new_cache(model, 2, 10), ahn.AHNCache)

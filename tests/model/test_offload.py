"""Bases that accelerate keeps on the CPU or on disk: the memory is where the layers compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import adapted, awaken, base, tokens
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache, AHNError

accelerate = pytest.importorskip("accelerate")
CONFIG = ahn.AHNConfig(window=13, sinks=3)


def offload(model: PreTrainedModel, where: str, folder: Path) -> PreTrainedModel:
    cpu = torch.device("cpu")
    if where == "disk":
        return accelerate.disk_offload(model, folder, execution_device=cpu)
    return accelerate.cpu_offload(model, execution_device=cpu)


@pytest.mark.sample(2)
@pytest.mark.parametrize("where", ["disk", "cpu"])
@pytest.mark.parametrize("options", [{}, {"q_proj": True, "router": True}], ids=["plain", "q_proj and router"])
@torch.no_grad()
def test_a_memory_on_an_offloaded_base(where: str, options: dict[str, bool], tmp_path: Path) -> None:
    """The same numbers as on a base in memory: forward, generate, a conversation on disk, disabled, detached."""
    ids, config = tokens(1, 60), CONFIG.replace(**options)
    expected = adapted(window=13, sinks=3, **options)
    ahn.save_adapter(expected, tmp_path / "adapter")
    model = offload(base(), where, tmp_path / "weights")
    awaken(ahn.attach(model, config))
    assert not any(x.is_meta for x in ahn.adapter_parameters(model).values())
    ahn.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5), expected.generate(ids, max_new_tokens=5))
    cache = AHNCache.for_model(model)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = AHNCache.load(tmp_path / "cache", model)
    assert torch.equal(model(ids, past_key_values=loaded).logits, model(ids, past_key_values=cache).logits)
    with ahn.disabled(model):
        assert torch.equal(model(ids).logits, base()(ids).logits)
    ahn.detach(model)
    assert torch.equal(model(ids).logits, base()(ids).logits)


@pytest.mark.parametrize("where", ["disk", "cpu"])
@torch.no_grad()
def test_a_memory_that_was_offloaded_with_its_base_comes_back(where: str, tmp_path: Path) -> None:
    options: dict[str, bool] = {"q_proj": True, "router": True}
    ids, expected = tokens(1, 60), adapted(window=13, sinks=3, **options)
    model = offload(adapted(window=13, sinks=3, **options), where, tmp_path / "weights")
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not any(x.is_meta for x in ahn.adapter_parameters(model).values())
    ahn.save_adapter(model, tmp_path / "adapter")
    ahn.detach(model)
    assert torch.equal(model(ids).logits, base()(ids).logits)


def test_a_memory_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = ahn.attach(type(base())(base().config), CONFIG)
    with pytest.raises(AHNError, match="on the meta device: load them"):
        model(tokens(1, 60).to("meta"))

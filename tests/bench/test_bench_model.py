"""Where the measured model comes from, and that random weights make a working one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_shape import SHAPE
from transformers import PreTrainedModel

from ahn.bench import model as bench_model
from ahn.errors import AHNError

CPU = torch.device("cpu")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **SHAPE}))
    return folder / "config.json"


def test_a_configuration_is_enough(config_file: Path) -> None:
    for name, random in ((config_file, False), (config_file.parent, True)):
        subject = bench_model.load(str(name), random, CPU, torch.bfloat16)
        assert (subject.name, subject.random) == ("small", True)
        assert {p.dtype for p in subject.model.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in subject.model.parameters())


def test_the_models_own_weights_unless_told_otherwise(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    subject = bench_model.load(str(tmp_path / "saved"), False, CPU, torch.float32)
    assert not subject.random
    assert torch.equal(subject.model.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert bench_model.load(str(tmp_path / "saved"), True, CPU, torch.float32).random


def test_random_models_do_not_stop_early(model: PreTrainedModel) -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50).shape == (2, 53)


def test_random_models_know_positions(model: PreTrainedModel) -> None:
    """Rotary frequencies that were never computed would be zero or anything."""
    frequencies = model.get_decoder().rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10000.0 ** -(torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize("name", ["no-such-shape", "./nowhere/at/all"])
@pytest.mark.parametrize("random", [False, True])
def test_what_does_not_exist(name: str, random: bool) -> None:
    with pytest.raises(AHNError, match=name):
        bench_model.load(name, random, CPU, torch.float32)


def test_a_configuration_that_asks_for_a_kernel_of_the_hub_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "_attn_implementation": "somebody/fast"}))
    for name in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(AHNError, match="asks for code from the Hub"):
            bench_model.config_of(str(name))

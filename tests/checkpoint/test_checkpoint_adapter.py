"""save_adapter and load_adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAULTS
from golden import CASES, Case, base_model, draw_weights
from golden import name as case_name
from safetensors.torch import save_file
from tiny_checkpoints import all_tensors, attached, edit_config, logits, make_adapter, make_base, publish, same_bits
from transformers import AutoModelForCausalLM

import ahn
from ahn import memory
from ahn.checkpoint import load_adapter, save_adapter

Copy = Callable[[Path], Path]


@pytest.mark.sample(len(memory.names()))
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("name", memory.names())
def test_a_saved_adapter_gives_the_same_model(tmp_path: Path, family: str, name: str) -> None:
    base = make_base(tmp_path / "base", family)
    model = attached(base, memory=name, router=name != "mamba2", q_proj=name == "mamba2", full_attention_layers=(1,))
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert loaded.ahn_config == model.ahn_config
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(ahn.detach(model)))  # else the comparison shows nothing


def test_layout_is_the_published_one(adapter: Path) -> None:
    assert sorted(file.name for file in adapter.iterdir()) == ["config.json", "model.safetensors"]
    parameters = [
        "A_log",
        "D",
        "dt_bias",
        *(f"{name}.weight" for name in ("a_proj", "b_proj", "g_proj", "o_norm", "o_proj")),
    ]
    names = {f"model.layers.{i}.ahn.fn.{name}" for i in range(3) for name in parameters}
    names |= {f"model.layers.{i}.ahn_router.{name}" for i in range(3) for name in ("alpha", "beta")}
    assert set(all_tensors(adapter)) == names
    config = json.loads((adapter / "config.json").read_text())
    assert (config["_ahn_implementation"], config["use_ahn_router"], config["use_q_proj"]) == (
        "GatedDeltaNet",
        True,
        False,
    )
    assert (config["model_type"], config["hidden_size"], config["fa_layer_ids"]) == ("ahn", 32, [])
    assert config["base_model_name_or_path"] == "../base"
    assert "ahn" not in str(config.get("_attn_implementation", config.get("attn_implementation")))


def test_weights_keep_their_dtype_on_disk_and_take_the_bases_in_memory(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "half", dtype=torch.bfloat16)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    stored = all_tensors(adapter)
    for name, parameter in ahn.adapter_parameters(model).items():
        assert torch.equal(parameter, stored[name].bfloat16()) and parameter.requires_grad
    save_adapter(model, tmp_path / "again")
    assert same_bits(all_tensors(tmp_path / "again"), {name: tensor.bfloat16() for name, tensor in stored.items()})


def test_window_and_sinks_can_be_chosen(base: Path, adapter: Path) -> None:
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, window=11)
    assert (model.ahn_config.window, model.ahn_config.sinks) == (11, 2)
    with pytest.raises(ahn.AHNError, match="window"):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, window=0)


def test_a_published_directory_loads_as_it_is(
    base: Path, adapter: Path, copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    published = publish(copy(adapter), use_ahn_router=True, fa_layer_ids="", unknown_key={"of": "another version"})
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), published)
    assert (model.ahn_config.window, model.ahn_config.sinks) == (32640, 128)
    assert "256" in caplog.text and "32640" in caplog.text
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(base), published, window=8, sinks=2)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_and_leave_the_model_alone(base: Path, adapter: Path, copy: Copy, fault: str) -> None:
    damage, words = FAULTS[fault]
    damaged = copy(adapter)
    damage(damaged)
    model = AutoModelForCausalLM.from_pretrained(base)
    before, state = logits(model), set(model.state_dict())
    with pytest.raises(ahn.AHNError, match=words):
        load_adapter(model, damaged)
    assert set(model.state_dict()) == state and torch.equal(logits(model), before)


def test_an_adapter_replaces_another(tmp_path: Path, base: Path, adapter: Path, copy: Copy) -> None:
    other = make_adapter(tmp_path / "other", base, memory="mamba2")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), other)
    before = logits(model)
    broken = edit_config(copy(adapter), lambda config: config.update(num_hidden_layers=4))
    with pytest.raises(ahn.AHNError, match="layers"):
        load_adapter(model, broken)
    assert model.ahn_config.memory == "mamba2" and torch.equal(logits(model), before)
    load_adapter(model, adapter)
    assert torch.equal(logits(model), logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)))


def test_other_kinds_of_directories_are_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ahn.AHNError, match="plain model without AHN"):
        load_adapter(model, base)
    with pytest.raises(ahn.AHNError, match="is a file"):
        load_adapter(model, adapter / "config.json")
    with pytest.raises(ahn.AHNError, match="AHN"):
        save_adapter(model, tmp_path)
    for name in memory.baselines():
        with pytest.raises(ahn.AHNError, match=f"{name}.*has no parameters"):
            save_adapter(attached(base, memory=name), tmp_path)


def test_saving_replaces_an_adapter_but_no_other_model(tmp_path: Path, base: Path, adapter: Path, copy: Copy) -> None:
    model = attached(base, memory="deltanet")
    replaced = save_adapter(model, copy(adapter))
    assert json.loads((replaced / "config.json").read_text())["_ahn_implementation"] == "DeltaNet"
    assert sorted(file.name for file in replaced.iterdir()) == ["config.json", "model.safetensors"]
    own = copy(base)
    before = all_tensors(own)
    with pytest.raises(ahn.AHNError, match="another model"):
        save_adapter(model, own)
    assert same_bits(all_tensors(own), before)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path, base: Path) -> None:
    """`save_pretrained` of transformers logs it, writes nothing and goes on."""
    model = attached(base)
    (tmp_path / "file").write_text("mine")
    for save in (lambda path: save_adapter(model, path), model.save_pretrained):
        for path in (tmp_path / "file", tmp_path / "file" / "inside"):
            with pytest.raises(ahn.AHNError, match=r"is a file|cannot be written: Not a directory"):
                save(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_could_not_be_loaded_is_not_saved(adapter: Path, copy: Copy, base: Path) -> None:
    old = copy(adapter)
    before = all_tensors(old)
    model = attached(base, router=True)
    weight = next(p for name, p in ahn.adapter_parameters(model).items() if name.endswith("fn.o_proj.weight"))
    kept = weight.detach().clone()
    weight.data[0, 0] = torch.inf
    with pytest.raises(ahn.AHNError, match=r"fn.o_proj.weight holds NaN or infinite values.* is not saved"):
        save_adapter(model, old)
    weight.data.copy_(kept)
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].ahn.fn.o_proj)
    with pytest.raises(ahn.AHNError, match=r"not what 'gated_deltanet' has \(layers.0.ahn.fn.o_proj.*weight_norm"):
        save_adapter(model, old)
    assert same_bits(all_tensors(old), before)


def test_a_failed_save_leaves_the_old_adapter(adapter: Path, copy: Copy, base: Path, monkeypatch: Any) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    target = copy(adapter)
    with pytest.raises(ahn.AHNError, match="disk full"):
        save_adapter(attached(base, memory="deltanet"), target)
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert same_bits(all_tensors(target), all_tensors(adapter))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_published_parameters_are_complete(case: Case, tmp_path: Path) -> None:
    """Names and shapes of the published modules: no tensor is left over or missing."""
    model = base_model(case)
    config = model.config.to_diff_dict() | {"_ahn_implementation": case["ahn"], "sliding_window": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(draw_weights(case)[1], tmp_path / "model.safetensors")
    load_adapter(model, tmp_path, window=case["sliding_window"], sinks=case["num_attn_sinks"])
    stored = all_tensors(tmp_path)
    assert same_bits({n: p.detach() for n, p in ahn.adapter_parameters(model).items()}, stored)

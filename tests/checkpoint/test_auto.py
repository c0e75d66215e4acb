"""transformers' own ways to load a model, on merged and saved checkpoints: with the memory, or an error."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, pipeline

import ahn
from ahn import tiny
from ahn.checkpoint import from_pretrained, merge


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(base, adapter, tmp_path_factory.mktemp("auto") / "merged")


@pytest.fixture(scope="module")
def wanted(merged: Path) -> torch.Tensor:
    return logits(from_pretrained(merged))


def run(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_auto_classes_load_the_memory(merged: Path, wanted: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert type(model) is Qwen2ForCausalLM and torch.equal(logits(model), wanted)
    model, report = AutoModelForCausalLM.from_pretrained(str(merged), output_loading_info=True, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not report["missing_keys"] and hasattr(model, "ahn_config")
    config = AutoConfig.from_pretrained(merged)
    assert (config.model_type, config.hidden_size, config.layer_types[0]) == ("ahn", 32, "full_attention")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(merged, config=config)), wanted)
    with pytest.raises(ahn.AHNError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(config)


def test_a_saved_configuration_is_the_checkpoints(merged: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(merged).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    block = json.loads((merged / "config.json").read_text())["ahn"]
    assert (again.model_type, again.ahn, again.hidden_size) == ("ahn", block, 32)


def test_pipeline_loads_the_memory(tmp_path: Path) -> None:
    whole = merge(tiny.path(), tiny.adapter_path("gated_deltanet"), tmp_path / "merged")
    made = pipeline("text-generation", model=str(whole))
    assert made.model.ahn_config.memory == "gated_deltanet"
    assert made("def", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("def")
    assert len(AutoTokenizer.from_pretrained(whole)) == 4096


def test_as_trainers_look_it_up(merged: Path, wanted: torch.Tensor) -> None:
    import transformers

    (name,) = AutoConfig.from_pretrained(merged).architectures
    assert torch.equal(logits(getattr(transformers, name).from_pretrained(merged)), wanted)


@pytest.mark.parametrize(
    "first", ["import ahn", "import transformers", "from transformers import AutoModelForCausalLM"]
)
def test_the_order_of_imports_does_not_matter(merged: Path, first: str) -> None:
    done = run(
        f"{first}\nimport ahn, sys\nfrom transformers import AutoModelForCausalLM\n"
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).ahn_config.memory)",
        merged,
    )
    assert done.stdout == "gated_deltanet\n", done.stderr


def test_without_ahn_it_is_an_error(merged: Path) -> None:
    done = run("import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])", merged)
    assert done.returncode and "model type `ahn`" in done.stderr


def test_importing_ahn_stays_light() -> None:
    done = run("import sys, ahn; print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_a_pickled_model_loads_in_a_new_process(base: Path, tmp_path: Path, way: str, merged: Path) -> None:
    import pickle

    model = from_pretrained(merged)
    torch.save(logits(model), tmp_path / "wanted")
    if way == "torch.save":
        torch.save(model, tmp_path / "model")
    else:
        (tmp_path / "model").write_bytes(pickle.dumps(copy.deepcopy(model) if way == "deepcopy" else model))
    load = (
        "torch.load(sys.argv[1], weights_only=False)" if way == "torch.save" else "pickle.load(open(sys.argv[1], 'rb'))"
    )
    done = run(
        f"import pickle, sys, torch\nmodel = {load}\nsys.path.append(sys.argv[3])\n"
        "from tiny_checkpoints import logits\nassert torch.equal(logits(model), torch.load(sys.argv[2]))",
        tmp_path / "model",
        tmp_path / "wanted",
        Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr

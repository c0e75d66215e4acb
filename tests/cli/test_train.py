"""The verb `ahn train`, and the configurations that come with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import ahn
from ahn.cli import train
from ahn.training.arguments import parse

CONFIGS = Path(__file__).parents[2] / "configs"
SMALLER = ["--max_steps", "4", "--cutoff_len", "130", "--max_eval_samples", "2", "--learning_rate", "0.006"]

HEADINGS = [f"{group}:" for group in train.GROUPS.values()]


def test_help(ahn_cli: Any) -> None:
    for words in (["--help"], []):
        result = ahn_cli("train", *words)
        assert result.code == 0
        assert all(flag in result.out for flag in ("--ahn_implementation", "[256,16384]", "torchrun"))
        assert [line for line in result.out.splitlines() if line in HEADINGS] == HEADINGS


def test_help_has_room_on_a_narrow_terminal(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = ahn_cli("train", "--help").out.partition("  --model_name")[2].partition("Also every")[0].splitlines()
    assert max(map(len, lines)) <= 60
    assert len(lines) < 160, "no column of a few letters"


def test_the_debug_run_learns_and_its_adapter_loads(ahn_cli: Any, tmp_path: Path) -> None:
    """In a smaller shape than the file's, to take seconds."""
    result = ahn_cli("train", CONFIGS / "debug.yaml", "--output_dir", tmp_path / "out", *SMALLER)
    assert result.code == 0, result.err
    assert "sinks + window" in result.out and "with the memory" in result.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["after"]["eval_kl"] < results["before"]["eval_kl"]
    model = ahn.from_pretrained(tmp_path / "out")
    assert model.ahn_config.memory == "gated_deltanet" and model.ahn_config.window == 48
    assert (tmp_path / "out" / "loss.png").exists() and (tmp_path / "out" / "README.md").exists()
    again = ahn_cli("train", CONFIGS / "debug.yaml", "--output_dir", tmp_path / "out")
    assert again.code == 1 and "holds an earlier run (checkpoint-4)" in again.err


def test_mistakes_are_one_line(ahn_cli: Any) -> None:
    result = ahn_cli("train", "--model_name_or_path", "ahn-tiny", "--dataste", "x")
    assert (result.code, result.out) == (1, "")
    assert result.err == "ahn: Unknown setting 'dataste'; did you mean dataset?\n"


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_configurations_are_valid(name: str) -> None:
    settings, trainer = parse([str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true", "--bf16", "false"])
    settings.schedule(0)
    if name in ("debug", "retained"):
        return
    assert settings.horizons is None, "the paper's start"
    assert 8 * trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps == 128
    assert (settings.cutoff_len, settings.filter_len, settings.dataset) == (24576, 288, "chatqa2")
    assert (trainer.learning_rate, trainer.weight_decay, trainer.get_warmup_steps(740)) == (1e-4, 0.1, 74)
    assert name.split("-")[1].upper() in str(settings.model_name_or_path)


def test_the_sharding_configuration_is_accelerates() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    file = CONFIGS / "accelerate" / "fsdp2.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(file))
    assert config.num_processes == 8 and config.fsdp_config["fsdp_version"] == 2
    assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"

"""Models known by name, in every place that takes a model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import speaking

from ahn import smollm2, tiny
from ahn.checkpoint import shipped
from ahn.errors import AHNError


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> speaking.Speaking:
    """A small chat model in the place of SmolLM2, and a memory as if it were shipped for it."""
    saved = speaking.save(tmp_path, speaking.CHATML, memory="gated_deltanet")
    monkeypatch.setattr(smollm2, "path", lambda: saved.base)
    (tmp_path / "shipped").mkdir()
    saved.adapter.rename(tmp_path / "shipped" / "gated_deltanet")
    monkeypatch.setattr(smollm2, "_ADAPTERS", tmp_path / "shipped")
    return speaking.Speaking(saved.base, tmp_path / "shipped" / "gated_deltanet")


@pytest.mark.parametrize("name", shipped.NAMES)
def test_every_name_is_a_module_with_the_same_three_functions(name: str) -> None:
    module: Any = shipped.known(name)
    assert module is importlib.import_module(f"ahn.{name}")
    assert {"path", "adapters", "adapter_path"} <= set(module.__all__)


def test_another_name_stays_as_it_is() -> None:
    for name in ("Qwen/Qwen3-0.6B", "./tiny", "/tmp/smollm2"):
        assert shipped.resolve(name) == shipped.base_name(name) == name
        assert shipped.resolve_adapter(name, "deltanet") == "deltanet"
        assert shipped.resolve_adapter(name, None) is None


def test_a_directory_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert shipped.resolve("tiny") == str(tiny.path()), "a folder that holds no model is not meant"
    (tmp_path / "tiny" / "config.json").touch()
    assert shipped.resolve("tiny") == "tiny"


def test_a_memory_by_its_kind() -> None:
    assert shipped.resolve_adapter("tiny", "deltanet") == str(tiny.adapter_path("deltanet"))
    assert shipped.resolve_adapter("tiny", None, "mamba2") == str(tiny.adapter_path("mamba2"))
    assert shipped.resolve_adapter("tiny", None) == str(tiny.adapter_path(tiny.adapters()[0]))
    assert shipped.resolve_adapter("tiny", "./elsewhere") == "./elsewhere"


def test_what_an_adapter_records_can_be_found_elsewhere() -> None:
    assert shipped.base_name("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert shipped.base_name("tiny") == str(tiny.path())


def verbs(adapter: Path, out: Path) -> dict[str, list[str]]:
    """A short run of each verb that takes a model."""
    cheap = ["--window", "12", "--sinks", "4"]
    return {
        "generate": ["generate", "--model", "smollm2", "--prompt", "def f():", "--max-new-tokens", "2"],
        "info": ["info", "smollm2", "--adapter", "gated_deltanet"],
        "inspect": ["inspect", "--model", "smollm2", "--length", "64", *cheap, "--out", str(out)],
        "eval": ["eval", "perplexity", "--model", "smollm2", "--length", "64", *cheap, "--out", str(out)],
        "bench": ["bench", "memory", "--model", "smollm2", "--context", "64", *cheap, "--out", str(out)],
        "merge": ["merge", "--model", "smollm2", "--adapter", "gated_deltanet", "--output-path", str(out)],
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize("verb", ["generate", "info", "inspect", "eval", "bench", "merge"])
def test_every_verb_takes_the_name(
    verb: str, stand_in: speaking.Speaking, ahn_cli: Callable[..., Any], tmp_path: Path
) -> None:
    run = ahn_cli(*verbs(stand_in.adapter, tmp_path / "out")[verb])
    assert run.code == 0, run.err


@pytest.mark.parametrize("verb", ["generate", "info", "inspect", "eval", "bench", "merge"])
def test_one_line_where_it_cannot_be_had(
    verb: str, stand_in: speaking.Speaking, ahn_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nowhere() -> Path:
        raise AHNError("cannot be had here")

    monkeypatch.setattr(smollm2, "path", nowhere)
    run = ahn_cli(*verbs(stand_in.adapter, tmp_path / "out")[verb])
    assert (run.code, run.err.strip()) == (1, "ahn: cannot be had here")

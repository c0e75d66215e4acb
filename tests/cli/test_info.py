"""`ahn info` on configurations, checkpoints and adapters."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import ahn
from ahn.checkpoint import merge, save_adapter

PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 36,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "_ahn_implementation": "DeltaNet",
    "sliding_window": 256,
    "use_sliding_window": True,
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED))
    return file


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A small base model and an adapter for it, on disk."""
    config = Qwen2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=48,
        vocab_size=100,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    save_adapter(ahn.attach(model, ahn.AHNConfig("mamba2", window=24, sinks=8, full_attention_layers=(1,))), adapter)
    return base, adapter


def test_text_shows_the_numbers_of_the_paper(ahn_cli: Any, published: Path) -> None:
    result = ahn_cli("info", published, "--memory", "gated_deltanet", "--length", 128_000)
    assert result.code == 0
    assert "12,982,464 parameters, 0.42 % of the model" in result.out
    assert "3,085,938,688 parameters" in result.out
    rows = [line.split() for line in result.out.splitlines() if line.startswith("128,000")]
    assert rows[0][-2:] == ["26.0", "%"]
    assert rows[1][-2:] == ["59.4", "%"]
    assert "46.7" in rows[1]


def test_what_attach_refuses_is_refused_by_the_same_sentence(ahn_cli: Any, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)
    config.save_pretrained(tmp_path)
    result = ahn_cli("info", tmp_path)
    with pytest.raises(ahn.AHNError) as refused:
        ahn.attach(AutoModelForCausalLM.from_config(config))
    assert (result.code, result.out, result.err) == (1, "", f"ahn: {refused.value}\n")


def test_a_directory_is_as_good_as_its_file(ahn_cli: Any, published: Path) -> None:
    of_file = json.loads(ahn_cli("info", published, "--json").out)
    of_directory = json.loads(ahn_cli("info", published.parent, "--json").out)
    assert {**of_file, "model": ""} == {**of_directory, "model": ""}
    assert of_file["weights"] == []


def test_published_settings_but_not_their_window(
    ahn_cli: Any, published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = json.loads(ahn_cli("info", published, "--json").out)
    assert (data["ahn"]["memory"], data["ahn"]["window"], data["ahn"]["sinks"]) == ("deltanet", 32640, 128)
    assert "sliding_window 256" in caplog.text
    assert data["shape"]["layer_types"] == ["full_attention"] * 36


def test_window_and_sinks_follow_the_base(ahn_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({name: x for name, x in PUBLISHED.items() if name[0] != "_"} | {"max_position_embeddings": 8192})
    )
    assert "128 sinks + window 3,968 = 4,096 tokens" in ahn_cli("info", str(tmp_path)).out
    assert "128 sinks + window 500 = 628 tokens" in ahn_cli("info", str(tmp_path), "--window", "500").out


def test_options_change_the_memory_and_the_lengths(ahn_cli: Any, published: Path) -> None:
    options = ("--memory", "mamba2", "--window", 96, "--sinks", 0, "--length", 500, "--length", 64)
    data = json.loads(ahn_cli("info", published, *options, "--json").out)
    assert (data["ahn"]["memory"], data["ahn"]["window"], data["ahn"]["sinks"]) == ("mamba2", 96, 0)
    assert [cost["length"] for cost in data["costs"]] == [64, 500]
    assert data["costs"][0]["mixer_ratio"] == 1
    assert data["costs"][1]["mixer_ratio"] < 1


def test_an_adapter_brings_its_settings_and_weights(ahn_cli: Any, tiny: tuple[Path, Path]) -> None:
    base, adapter = tiny
    data = json.loads(ahn_cli("info", base, "--adapter", adapter, "--json").out)
    assert (data["ahn"]["memory"], data["ahn"]["window"], data["memory_layers"]) == ("mamba2", 24, [0, 2])
    assert [found["kind"] for found in data["weights"]] == ["base", "adapter"]
    assert data["weights"][1]["memory_parameters"] == data["memory_parameters"]
    assert data["weights"][0]["memory_tensors"] == 0
    text = ahn_cli("info", base, "--adapter", adapter, "--window", 56).out
    assert "8 sinks + window 56 = 64 tokens" in text
    assert "0, 2 (2 of 3)" in text


def test_a_merged_checkpoint_and_an_adapter_alone(ahn_cli: Any, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = tiny
    merge(base, adapter, tmp_path / "merged")
    merged = json.loads(ahn_cli("info", tmp_path / "merged", "--json").out)
    alone = json.loads(ahn_cli("info", adapter, "--json").out)
    assert [merged["weights"][0]["kind"], alone["weights"][0]["kind"]] == ["merged", "adapter"]
    assert merged["ahn"] == alone["ahn"]
    assert merged["costs"] == alone["costs"]


def test_a_damaged_adapter_is_named(ahn_cli: Any, tiny: tuple[Path, Path]) -> None:
    base, adapter = tiny
    file = adapter / "model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})
    result = ahn_cli("info", base, "--adapter", adapter)
    assert (result.code, result.out) == (1, "")
    assert "lacks 1 of" in result.err.splitlines()[-1]


@pytest.mark.slow
def test_the_figure_appears_whole_or_not_at_all(ahn_cli: Any, published: Path) -> None:
    figure = published.with_name("cost.png")
    assert ahn_cli("info", published, "--length", 1000, "--plot", figure).code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in published.parent.iterdir()) == ["config.json", "cost.png"]
    result = ahn_cli("info", published, "--plot", published.with_name("cost.xyz"))
    assert result.code == 1
    assert "suffix must be one of" in result.err
    assert ahn_cli("info", published, "--plot", published.parent / "absent" / "cost.png").code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("./no-such-model",), 1, "There is no file or directory './no-such-model'"),
        (("CONFIG", "--memory", "elephant"), 1, "Unknown memory 'elephant'"),
        (("CONFIG", "--window", "0"), 2, "--window"),
        (("CONFIG", "--length", "0"), 2, "--length"),
        ((), 2, "Missing argument"),
    ],
)
def test_mistakes(ahn_cli: Any, published: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = ahn_cli("info", *(str(published) if argument == "CONFIG" else argument for argument in arguments))
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_quantized_tokens_are_counted(ahn_cli: Any, published: Path) -> None:
    done = ahn_cli("info", published, "--quantized", 1000, "--length", 100_000, "--json")
    plain = ahn_cli("info", published, "--length", 100_000, "--json")
    ours, theirs = (json.loads(text.out)["costs"][0]["ahn"] for text in (done, plain))
    # 36 layers, 2 heads, keys of 128 numbers at four bits and values at two, each with a scale of 2 bytes, and two
    # offsets in float32
    assert ours["quantized_bytes"] == 36 * 2 * (1000 * (128 // 2 + 128 // 4 + 2 * 2) + 2 * 4 * 128)
    assert ours["mixer_flops"] > theirs["mixer_flops"] and theirs["quantized_bytes"] == 0
    assert "at 4/2 bits" in ahn_cli("info", published, "--quantized", 1000).out


def test_without_a_network_it_fails_at_once(ahn_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def unreachable(*address: object, **_: object) -> Any:
        asked.append(address)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def wait(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", wait)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", tmp_path if name == "HF_HUB_CACHE" else False)
    result = ahn_cli("info", "nobody/no-such-model")
    assert result.code == 1 and result.err.count("\n") == 1
    assert "'nobody/no-such-model' is neither a directory nor a Hugging Face Hub repository" in result.err
    assert 1 <= len(asked) <= 2

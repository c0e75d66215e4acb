"""`ahn bench` from end to end, with a model of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ahn.bench import ceilings
from ahn.cli.bench import BenchOptions, numbers
from ahn.errors import AHNError

SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 61,
}
SMALL = ("--window", 20, "--sinks", 4, "--device", "cpu")
FEW = ("--new-tokens", 2)
"""Of what writes tokens; other measurements refuse it."""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ceilings, "REPEATS", 1)
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SHAPE))
    return file


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_everything_side_by_side(ahn_cli: Any, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--model", small, *SMALL, *FEW, "--context", "50", "--batch", "1", "--out", out)
    options = (*options, "--no-activation-checkpointing")
    measurements = ("prefill", "decode", "memory", "throughput", "train")
    result = ahn_cli("bench", *measurements, *options, "--methods", "full-static,window,mamba2")
    assert result.code == 0, result.err
    run, *found = rows(out)
    assert {run[name] for name in ("kind", "model", "dtype")} == {"run", "small", "float32"}
    assert run["environment"]["packages"]["torch"]
    assert len(run["code"]["sources_sha256"]) == 64
    assert run["ceilings"]["copy_times"]
    assert [row["measurement"] for row in found] == [name for name in measurements for _ in range(3)]
    assert {row["run"] for row in found} == {run["run"]}
    assert found[-1]["measurement"] == "train" and found[-1]["activation_checkpointing"] is False
    assert [row["status"] for row in found] == ["ok"] * 12 + ["unsupported"] * 2 + ["ok"]
    assert sorted(file.name for file in out.iterdir()) == ["length.png", "rows.jsonl", "table.txt", "throughput.png"]
    assert (out / "table.txt").read_text() == result.out
    assert "share" in result.out


@pytest.mark.slow
def test_a_folder_is_filled_by_several_commands(ahn_cli: Any, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for method in ("window", "deltanet"):
        ahn_cli("bench", "prefill", "--model", small, *SMALL, "--methods", method, "--context", "30", "--out", out)
    result = ahn_cli("bench", "report", "--out", out)
    assert result.code == 0
    assert [line.split()[2] for line in result.out.splitlines() if line.startswith("     30")] == ["window", "deltanet"]


@pytest.mark.parametrize(
    ("model", "window", "measurement", "lossless", "contexts", "batches"),
    [
        ("tiny", None, "prefill", 256, [256, 1024, 4096], [1]),
        ("qwen2.5-3b", None, "decode", 32768, [32768, 131072, 1048576], [1]),
        ("qwen2.5-3b", 8064, "memory", 8192, [8192, 32768, 262144], [1]),
        ("qwen2.5-3b", None, "throughput", 32768, [131072], [1, 4, 16, 32, 64, 100]),
        ("qwen2.5-7b", None, "train", 8192, [24576], [1]),
        ("smollm2-135m", None, "decode", 4096, [4096, 16384, 131072], [1]),  # trained on 8 192 positions
        ("smollm2-135m", None, "train", 4096, [12288], [1]),
        ("smollm2-135m", 500, "decode", 628, [628, 2512, 20096], [1]),
    ],
)
def test_defaults_follow_the_base_and_the_window(
    model: str, window: int | None, measurement: str, lossless: int, contexts: list[int], batches: list[int]
) -> None:
    plan = BenchOptions(model, None, None, window, None, None, None, None, None).plan(measurement)
    assert {method.config.lossless for method in plan.methods if method.config} == {lossless}
    assert (plan.contexts, plan.batches) == (contexts, batches)
    first = "deltanet" if measurement == "train" else "full-dynamic"
    assert plan.methods[0].name == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "fast"), "Unknown method 'fast'"),
        (("--context", "32q"), "--context takes numbers"),
        (("--batch", "0"), "--batch takes numbers"),
        (("--dtype", "int8"), "Unknown dtype 'int8'"),
        (("--device", "cuda:77"), "no device 'cuda:77'"),
        (("--adapter", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_mistakes_are_one_clear_line(
    ahn_cli: Any, small: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = ahn_cli("bench", "prefill", "--model", small, "--out", tmp_path / "out", *options)
    assert result.code == 1
    assert message in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quantized_tokens_are_measured_and_shown(ahn_cli: Any, small: Path, tmp_path: Path) -> None:
    given = ("--model", small, *SMALL, "--methods", "window", "--context", "50", "--quantized", "12")
    result = ahn_cli("bench", "decode", *given, *FEW, "--out", tmp_path)
    assert result.code == 0 and "+12 at 4/2 bits" in result.out
    other = ahn_cli("bench", "decode", *given, *FEW, "--bits", "3/2", "--out", tmp_path)
    assert other.code == 0 and "+12 at 4/2 bits" in other.out and "+12 at 3/2 bits" in other.out
    for bits, why in (("3", "like 4/2"), ("5/2", "must be 2, 3 or 4")):
        wrong = ahn_cli("bench", "decode", *given, "--bits", bits, "--out", tmp_path / "other")
        assert wrong.code == 1 and why in wrong.err
    refused = ahn_cli("bench", "train", *given, "--out", tmp_path / "other")
    assert refused.code == 1 and "leave --quantized out" in refused.err
    assert not (tmp_path / "other").exists()


def test_report_of_nothing(ahn_cli: Any, tmp_path: Path) -> None:
    result = ahn_cli("bench", "report", "--out", tmp_path)
    assert (result.code, result.out) == (1, "")


def test_numbers() -> None:
    assert numbers("--context", "100, 32k,1M") == [100, 32768, 1 << 20]
    with pytest.raises(AHNError):
        numbers("--context", "")

"""benchmarks/peers without vLLM and without a GPU: its plain parts, what it refuses, and ours beside transformers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoConfig

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"


def module(name: str) -> ModuleType:
    """One of its modules, without its folder on the path of the tests that follow."""
    spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses look there
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    return module("plan")


def test_shape_that_vllm_reads(plan: ModuleType, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(plan.write_shape(tmp_path, "qwen2.5-3b", 524288))
    assert (config.num_hidden_layers, config.num_key_value_heads, config.vocab_size) == (36, 2, 151936)
    assert config.architectures == ["Qwen2ForCausalLM"] and config.max_position_embeddings >= 524288 + 272


def test_step_is_a_difference_of_calls(plan: ModuleType) -> None:
    found = plan.differences([3.0, 3.2, 9.0], [1.0, 1.0, 1.0], steps=10, batch=4)
    assert found["times_s"] == pytest.approx([0.2, 0.22, 0.8])
    assert found["seconds"] == pytest.approx(0.22) and found["tokens_per_second"] == pytest.approx(4 / 0.22)


def test_conversations_that_fit(plan: ModuleType) -> None:
    assert plan.held(100, 30, most=208) == 3 and plan.held(1e9, 30, most=208) == 208


def test_row_that_fails_or_takes_too_long_says_so(plan: ModuleType, tmp_path: Path) -> None:
    rows = plan.Rows(tmp_path / "rows.jsonl", {"system": "ours"}, until=float("inf"))
    assert rows.measure(lambda: {"seconds": 1.0}, context=8) == {"seconds": 1.0}
    assert rows.measure(lambda: 1 / 0, context=9) is None
    rows.until = 0.0
    assert rows.measure(lambda: pytest.fail("began"), 60.0, context=10) is None
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["system"], line["context"], line["status"]) for line in lines] == [
        ("ours", 8, "ok"),
        ("ours", 9, "failed"),
        ("ours", 10, "skipped"),
    ]
    assert "ZeroDivisionError" in lines[1]["why"] and "60 s" in lines[2]["why"]


def test_engine_has_room_for_the_longest_context(plan: ModuleType, tmp_path: Path) -> None:
    options = argparse.Namespace(contexts=[64, 4096], splits=64)
    chosen = module("peer_vllm").settings(options, tmp_path, "fp8")
    assert chosen["max_model_len"] == 4096 + plan.SPARE and chosen["kv_cache_dtype"] == "fp8"
    assert chosen["compilation_config"]["cudagraph_capture_sizes"][-1] == chosen["max_num_seqs"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(PEERS), *arguments]
    environment = os.environ | {"PYTHONPATH": paths} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_refused_without_vllm() -> None:
    answer = run("--only", "ours,vllm-fp8")
    assert answer.returncode == 2 and "vLLM is not installed" in answer.stderr and "--only ours" in answer.stderr


@pytest.mark.slow
def test_rows_of_ours_and_transformers(tmp_path: Path) -> None:
    small = "from ahn.bench import shapes as s\ns.SHAPES['qwen2.5-3b'] = s._QWEN2 | s._layers(2, 64, 4, 2, 96)\n"
    (tmp_path / "sitecustomize.py").write_text(small)
    out = tmp_path / "rows.jsonl"
    arguments = ["--only", "ours,transformers", "--contexts", "96", "--window", "48", "--sinks", "8", "--out", str(out)]
    answer = run(*arguments, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src")]))
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
    for line in lines:
        found[line["system"]].append(line)
    assert all("hardware" in own[0] and len(own[0]["ceilings"]) for own in found.values())
    rows = [(row["measurement"], row.get("lengths"), row["status"]) for row in found["transformers"][1:]]
    assert rows == [
        ("prefill", None, "ok"),
        ("decode", "first", "ok"),
        ("decode", "again", "ok"),
        ("decode", "again", "ok"),
        ("throughput", None, "ok"),
        ("decode", None, "ok"),
    ]
    assert [row["status"] for row in found["ours"][1:]] == ["ok"] * 3

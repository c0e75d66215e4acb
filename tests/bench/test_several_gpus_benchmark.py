"""benchmarks/several_gpus with two processes on a CPU: all of them give what one gives, in training and in reading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_shape import SHAPE

ROOT = Path(__file__).parents[2]
WAYS = ("ordinary", "captured")


def measured(tmp_path: Path, parts: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The line of each part, and all that was printed."""
    shape = tmp_path / "small.json"
    shape.write_text(json.dumps(SHAPE | {"model_type": "qwen2", "vocab_size": 62}))
    command = [sys.executable, str(ROOT / "benchmarks" / "several_gpus"), "--cpu", "--model", str(shape)]
    command += ["--length", "120", "--only", parts]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": paths}
    )
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    return {line["part"]: line for line in lines if "part" in line}, answer.stdout


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    found, printed = measured(tmp_path, "ddp,fsdp2,fsdp2-14b")
    for name in ("ddp", "fsdp2"):
        one, both = found[name]["one"], found[name]["all"]
        assert len(one["losses"]) == 5 and found[name]["fell_by"] > 0
        assert both["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert found[name]["ratio"] == pytest.approx(both["tokens_per_second"] / one["tokens_per_second"])
        assert f"| {name} | " in printed
    assert found["fsdp2-14b"]["fell_by"] > 0
    assert len(found["fsdp2-14b"]["peak_gib"]) == 2


@pytest.mark.slow
def test_reading(tmp_path: Path) -> None:
    found, printed = measured(tmp_path, "one,layers,heads")
    assert found["one"]["captured"]["heads"] == 4 and found["heads"]["ordinary"]["heads"] == 2
    for facts in (found["one"]["ordinary"], found["layers"]["ordinary"], *(found["heads"][way] for way in WAYS)):
        assert facts["logits_apart"] < 1e-4
        assert facts["same_tokens"] == 1
    assert "| heads, captured | " in printed and "failed" not in printed

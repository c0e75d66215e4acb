"""benchmarks/scaling.py with two processes on a CPU: DDP gives the losses of one, and shares of weights train."""

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


def measured(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The lines that two processes print."""
    shape = tmp_path / "small.json"
    shape.write_text(json.dumps(SHAPE | {"model_type": "qwen2"}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "benchmarks" / "scaling.py"), "--cpu", "--model", str(shape), "--length", "120"]
    command += ["--window", "24", "--sinks", "4", "--steps", "4", "--lr", "1e-2", *options]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": paths}
    )
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_replicas(tmp_path: Path) -> None:
    lines = measured(tmp_path)
    alone, together = (line for line in lines if "run" in line)
    assert len(alone["losses"]) == 4
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert lines[-1]["ratio"] == pytest.approx(together["tokens_per_second"] / alone["tokens_per_second"])
    assert lines[-1]["fell_by"] > 0


@pytest.mark.slow
def test_shares(tmp_path: Path) -> None:
    (found,) = (line for line in measured(tmp_path, "--sharded") if "run" in line)
    assert found["fell_by"] > 0
    assert len(found["peak_gib"]) == 2

"""benchmarks/serving on a CPU: every part gives its numbers, of our server and of one known by its URL alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "--context",
    "700",
    "--lengths",
    "300",
    "--conversations",
    "2",
    "--tokens",
    "8",
    "--repeats",
    "1",
    "--idle",
    "2",
]


def measured(*options: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The line of each part, and all that was printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "serving"), *SMALL, *options]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths}
    )
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    return {line["part"]: line for line in lines if "part" in line}, answer.stdout


@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    out = tmp_path / "rows.jsonl"
    found, printed = measured("--context", "500,700", "--state-dir", str(tmp_path), "--out", str(out))
    assert "failed" not in printed and "skipped" not in printed, printed
    assert set(found["read"]["first_token_s"]) == {"300", "700"}
    turn = found["second_turn"]
    assert all(turn[f"{place}_s"] < turn["read_anew_s"] for place in ("device", "memory"))
    assert all(turn[f"{place}_s"] > 0 for place in ("disk", "cold")) and turn["state_bytes"] > 1 << 20
    assert found["throughput"]["tokens_per_second"] > 0 < found["throughput"]["batch_tokens_per_second"]
    assert found["pace"]["while_others_read"]["count"] > 0
    assert found["idle"]["bytes_on_disk"] > 2 << 20
    start, *rows = [(line["part"], line.get("context")) for line in map(json.loads, out.read_text().splitlines()[1:])]
    assert rows == [(part, context) for context in (500, 700) for part in list(found)[1:]] and start[0] == "start"


@pytest.mark.slow
def test_replicas(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    found, printed = measured("--only", "replicas", "--state-dir", str(tmp_path))
    row = found["replicas"]
    assert "failed" not in row, printed
    assert len(row["alone"]) == 2 and row["stayed"]
    assert row["broken_off"] == 2 and not row["others_broken_off"]
    assert row["next_turn_cached"] == 700 + 300  # what another replica had written


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serving"), "--vllm", "--model", "qwen2.5-3b"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2 and "has to be installed" in answer.stderr


@pytest.mark.slow
def test_another_server() -> None:
    pytest.importorskip("fastapi")
    server = subprocess.Popen(
        [sys.executable, "-c", "from ahn.cli import main; main()", "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        url = next(line.split(" at ")[1].split()[0] for line in server.stderr if "Serving" in line)
        found, printed = measured(
            "--url", url, "--served", "tiny", "--vocabulary", "500", "--server", "ours", "--own-texts"
        )
        assert "failed" not in printed
        assert found["second_turn"]["kept_s"] < found["second_turn"]["read_anew_s"]
        assert found["throughput"]["made"] == "a text each" and "idle" not in found
    finally:
        server.terminate()
        server.wait()

"""What benchmarks/inspect_positions.py says of a memory that looks at distances, and of one that looks at positions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import inspect_positions

OPTIONS = ("--window", "96", "--sinks", "8", "--length", "1024", "--documents", "2")


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["deltanet", "routed_deltanet"])
def test_only_what_sees_positions_notices_where_a_text_begins(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(inspect_positions, "STARTS", (0, 30000))
    monkeypatch.setattr(sys, "argv", ["inspect_positions", memory, str(out), *OPTIONS])
    inspect_positions.main()
    here, there = json.loads(out.read_text())["rows"]
    assert (here["start"], there["start"]) == (0, 30000)
    assert here["asked"] == there["asked"] > 0 and here["won"] > 0.01
    same = abs(there["won"] / here["won"] - 1) < 0.01
    assert same == (memory == "deltanet")
    if same:
        assert here["recalled"] == there["recalled"]

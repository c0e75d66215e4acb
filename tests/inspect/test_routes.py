"""What benchmarks/inspect_routes.py says of a memory that has just begun, whose queries choose like keys."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import ahn
from ahn import AHNError, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import inspect_routes


def run(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    model = AutoModelForCausalLM.from_pretrained(tiny.path())
    ahn.save_adapter(ahn.attach(model, ahn.AHNConfig(memory=memory, window=24, sinks=8)), tmp_path / "adapter")
    out = tmp_path / "out.json"
    options = ["--window", "96", "--sinks", "8", "--length", "1024", "--documents", "1"]
    monkeypatch.setattr(sys, "argv", ["inspect_routes", str(tmp_path / "adapter"), str(out), *options])
    inspect_routes.main()
    return json.loads(out.read_text())


def test_shares_are_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = run("routed_deltanet", tmp_path, monkeypatch)["layers"]
    assert list(layers) == [str(layer) for layer in range(8)]
    for row in layers.values():
        assert all(len(values) == 4 for values in row.values())
        assert all(1 <= used <= 4 + 1e-4 for used in row["states used"])
        for name in ("keys", "queries"):
            assert all(0.25 <= share <= 1 for share in row[f"largest share, {name}"])
        assert all(0 <= common <= 1 for name in ("the fact", "any key") for common in row[f"in common with {name}"])


def test_one_state_leaves_nothing_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AHNError, match="deltanet has one state a head"):
        run("deltanet", tmp_path, monkeypatch)

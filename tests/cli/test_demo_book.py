"""`ahn demo --model smollm2`: what it prints and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import speaking
import transformers

from ahn import smollm2
from ahn.cli import demo_book
from ahn.demo.methods import FULL, WINDOW_ONLY

TEXT = "".join(f"The ship number {n} came into the harbour. Nobody saw it on that day in May. " for n in range(400))


def test_the_verb(ahn_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = speaking.save(tmp_path, speaking.CHATML)
    (tmp_path / "shipped").mkdir()
    saved.adapter.rename(tmp_path / "shipped" / "gated_deltanet")
    monkeypatch.setattr(smollm2, "path", lambda: saved.base)
    monkeypatch.setattr(smollm2, "_ADAPTERS", tmp_path / "shipped")
    monkeypatch.setattr(demo_book, "PAGES", 256)
    (tmp_path / "a[b].txt").write_text(TEXT)
    arguments = ("demo", "--model", "smollm2", "--text", tmp_path / "a[b].txt", "--length", 2048, "--window", 12)
    arguments += ("--quantized", 64)
    done = ahn_cli(*arguments, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    assert "SmolLM2-135M-Instruct reads 2,048 tokens of a[b].txt; it was trained on 512" in shown
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [entry["name"] for entry in result["results"]]
    assert names == [FULL, WINDOW_ONLY, "64 at 4/2 bits", "gated_deltanet"]
    assert (result["window"], result["quantized"], result["trained_positions"]) == (12, 64, 512)
    assert result["versions"]["transformers"] == transformers.__version__
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    short = ahn_cli(*arguments[:5], "--length", 10**6)
    assert short.code == 1 and "is needed" in short.err

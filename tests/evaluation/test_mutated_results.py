"""Results that somebody else wrote, or that a disk has damaged: a report, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile import mutated_bytes, mutated_json

from ahn.errors import AHNError
from ahn.evaluation.report import write_report

MUTATIONS = 200
SETTINGS = {
    "task": "longbench/qmsum", "profile": "official", "limit": None, "task_settings": {"length": 4000},
    "model": "tiny", "weights": ["w"], "window": 224, "sinks": 32, "method": "ahn", "memory": "gated_deltanet",
    "quantized": 64, "key_bits": 4, "value_bits": 2, "keys_before_rope": True, "dtype": "float32", "router": False,
    "q_proj": False, "full_attention_layers": [], "max_new_tokens": 32, "truncation": "middle",
}  # fmt: skip
ABOUT = {"adapter": "adapters/gdn", "versions": {"ahn": "0.1.0"}}
SCRIPT = "<script>alert(1)</script>"


def folder(path: Path, settings: dict[str, Any], figures: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"settings": settings, "about": ABOUT}))
    (path / "result.json").write_text(json.dumps(figures))
    (path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def results(path: Path) -> list[Path]:
    """One scored task and one grid of needles."""
    plain = {"task": "longbench/qmsum", "samples": 4, "score": 20.5}
    lines = [{"id": str(i), "score": 1.0, "length": 4000, "depth": 50.0 * (i % 2)} for i in range(4)]
    grid = [{"length": 4000, "depth": depth, "score": 75.0, "samples": 2} for depth in (0.0, 50.0)]
    needle = {"task": "needle/fact", "samples": 4, "score": 75.0, "grid": grid}
    return [
        folder(path / "a", SETTINGS, plain, []),
        folder(path / "b", SETTINGS | {"task": "needle/fact"}, needle, lines),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_mutated_results(name: str, tmp_path: Path) -> None:
    """Every one gives a report or an AHNError of a readable length, never a traceback or markup of its own."""
    outcomes = {"refused": 0, "report": 0}
    for seed in range(MUTATIONS):
        _, changed = results(tmp_path / "in")
        file = changed / name
        content = file.read_bytes()
        if seed % 2:
            file.write_bytes(mutated_bytes(content, seed))
        else:
            value = json.loads(content)
            mutated_json(value, seed)
            file.write_text(json.dumps(value))
        try:
            write_report([tmp_path / "in"], tmp_path / "out")
            assert "<script>" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
            outcomes["report"] += 1
        except AHNError as error:
            assert len(str(error)) < 1000
            outcomes["refused"] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {file.read_bytes()[:300]!r}")
            raise
    assert sum(outcomes.values()) == MUTATIONS and min(outcomes.values()), outcomes


@pytest.mark.parametrize("where", ["memory", "model", "method", "task", "profile", "adapter"])
def test_markup_in_a_result_is_text(where: str, tmp_path: Path) -> None:
    settings, figures = dict(SETTINGS), {"task": "longbench/qmsum", "samples": 4, "score": 20.5}
    if where == "task":
        figures["task"] = f"longbench/{SCRIPT}"
    elif where != "adapter":
        settings[where] = SCRIPT
    path = folder(tmp_path / "in" / "a", settings, figures, [])
    folder(tmp_path / "in" / "b", SETTINGS | {"window": 100}, figures, [])
    if where == "adapter":
        (path / "config.json").write_text(json.dumps({"settings": settings, "about": {"adapter": f"x/{SCRIPT}"}}))
    write_report([tmp_path / "in"], tmp_path / "out")
    pages = [file.read_text(encoding="utf-8") for file in (tmp_path / "out").rglob("*.html")]
    assert pages and not any("<script>alert" in page for page in pages)

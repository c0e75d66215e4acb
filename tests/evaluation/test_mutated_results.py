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


BUCKET = {"loss": 1.0, "cache_bytes": 2**20, "seconds": 1.0, "peak_bytes": None}
LINES = {
    "positions.jsonl": [BUCKET | {"start": n, "stop": n + 100} for n in range(0, 400, 100)],
    "cost.jsonl": [{"length": 1 << n, "flops": 10**n, "cache_bytes": 2**n} for n in (10, 11, 12)],
    "gradients.jsonl": [{"token": " $x$ ", "norm": 0.5, "region": "remembered"}] * 3,
}


def others(path: Path) -> Path:
    """A document's losses and its gradients, in one folder of results each."""
    for task, more in {
        "perplexity": {"document": "a", "tokens": 400, "loss": 1.0, "cache_bytes": 4, "peak_bytes": None}
        | {"tokens_per_second": 1.5},
        "gradients": {},
    }.items():
        settings = SETTINGS | {"task": task, "task_settings": {"loss": "kl"}}
        made = folder(path / task, settings, {"task": task, **more}, [])
        for name, rows in LINES.items():
            (made / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"perplexity/{name}" for name in ("config.json", "result.json", *LINES)] + ["gradients/gradients.jsonl"]
)
def test_mutated_documents(name: str, tmp_path: Path) -> None:
    for seed in range(MUTATIONS // 10):
        file = others(tmp_path / "in") / name
        lines = file.read_text().splitlines()
        value = json.loads(lines[0])
        mutated_json(value, seed)
        file.write_text("\n".join([json.dumps(value), *lines[1:]]) + "\n")
        try:
            write_report([tmp_path / "in"], tmp_path / "out")
        except AHNError as error:
            assert len(str(error)) < 1000


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("perplexity/result.json", '"loss": 1.0', '"loss": 1e308'),
        ("perplexity/result.json", '"tokens": 400', '"tokens": "many"'),
        ("perplexity/positions.jsonl", '"loss": 1.0', '"loss": NaN'),
        ("perplexity/cost.jsonl", '"length": 1024', '"length": 0'),
        ("gradients/gradients.jsonl", '"norm": 0.5', '"norm": null'),
        ("gradients/gradients.jsonl", "remembered", r"\ud800"),
        ("gradients/config.json", '"kl"', "[]"),
    ],
)
def test_what_a_report_cannot_show_is_named(name: str, old: str, new: str, tmp_path: Path) -> None:
    file = others(tmp_path / "in") / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(AHNError, match=name.partition("/")[0]):
        write_report([tmp_path / "in"], tmp_path / "out")


def test_a_fault_of_our_own_is_not_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("ours")

    others(tmp_path / "in")
    monkeypatch.setattr("ahn.evaluation.report.tables.perplexities", broken)
    with pytest.raises(TypeError, match="ours"):
        write_report([tmp_path / "in"], tmp_path / "out")


def test_dollar_signs_in_a_name_are_no_formula(tmp_path: Path) -> None:
    _, needle = results(tmp_path / "in")
    config = (needle / "config.json").read_text()
    (needle / "config.json").write_text(config.replace('"gated_deltanet"', r'"$\\frac{$"'))
    write_report([tmp_path / "in"], tmp_path / "out")


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

"""An option that changes nothing in the command that was typed is refused, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ahn.evaluation.tasks import BENCHMARKS, OF_GENERATED, OF_QUESTIONS, USES, without_use

REFUSED = {
    "generate --prompt x --temperature 0 --top-p 0.5": "temperature 0 draws none",
    "chat --temperature 0 --top-p 0.5": "temperature 0 draws none",
    "serve --disk-mib 5": "--disk-mib changes nothing without --state-dir",
    "bench prefill --new-tokens 5": "--new-tokens changes nothing without decode or memory or throughput",
    "bench prefill memory --real-prefill": "--real-prefill changes nothing without decode or throughput",
    "bench memory --profile": "--profile changes nothing without decode or prefill or train",
    "bench decode --no-activation-checkpointing": "--no-activation-checkpointing changes nothing without train",
    "bench decode --methods window,deltanet --bits 2/2": "--bits changes nothing where no token is kept in codes",
    "bench report --context 1k": "--context changes nothing for a report",
    "bench report --max-seconds 3": "--max-seconds changes nothing for a report",
    "bench report --model smollm2": "--model changes nothing for a report",
    "demo --model smollm2 --documents 2": "--documents changes nothing where one book is read",
    "eval perplexity --book 3": "--book chooses a text of JSON lines",
    "eval gradients --book 3 --text book.txt": "--book chooses a text of JSON lines",
    "eval needle --data-dir .": "--data-dir changes nothing for needle",
    "eval needle recall --max-length 9": "--max-length changes nothing for needle, recall",
    "eval ruler --depth 30": "--depth changes nothing for ruler",
    "eval longbench infinitebench --seed 3": "--seed changes nothing for longbench, infinitebench",
    "eval lveval --haystack book.txt": "--haystack changes nothing for lveval",
    "eval lveval/128k --length 300": "--length changes nothing for lveval/128k",
    "eval ruler/vt/4k --length 300": "--length changes nothing for ruler/vt/4k",
    "eval longbench --samples 3": "--samples changes nothing for longbench",
}


@pytest.mark.parametrize("line", REFUSED)
def test_an_option_without_effect_is_refused(
    ahn_cli: Callable[..., Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("one two")
    run = ahn_cli(*line.split())
    assert (run.code, run.out) == (1, "")
    assert REFUSED[line] in " ".join(run.err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_every_benchmark_says_what_changes_it() -> None:
    assert USES.keys() == BENCHMARKS.keys()
    assert "seed" not in without_use(["needle/fact", "longbench"])
    assert without_use(["needle", "longbench"]) == set()
    assert without_use(["needle"]) == OF_QUESTIONS
    assert without_use(["lveval"]) == OF_GENERATED | {"depths"}

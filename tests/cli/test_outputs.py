"""Where results go is tried before the work, and what was begun and failed leaves nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ahn.cli import common, train

WRITING = {
    "demo": ("demo", "--out"),
    "demo of a book": ("demo", "--model", "smollm2", "--out"),
    "inspect": ("inspect", "--out"),
    "bench": ("bench", "prefill", "--model", "tiny", "--methods", "window", "--out"),
    "info": ("info", "tiny", "--plot"),
    "eval": ("eval", "needle", "--out"),
    "eval perplexity": ("eval", "perplexity", "--out"),
    "eval gradients": ("eval", "gradients", "--out"),
}
LOADERS = (
    *("ahn.cli.session.open_session", "ahn.bench.model.load", "ahn.cli.info.look_at", "ahn.evaluation.methods.load"),
    "ahn.checkpoint.loading.ModelSource.open",
)
WRONG = (
    *("generate --file none", "generate --prompt x --top-p 0", "generate --prompt x --seed 99999999999999999999"),
    *("chat --top-p nan", "inspect --text none", "demo --text none", "demo --model smollm2 --length 5"),
    *("eval nonsense", "eval needle --haystack none", "eval longbench --data-dir none", "eval longbench --profile x"),
    *("eval perplexity --text none", "eval perplexity --book 3", "eval gradients --loss x", "eval gradients --book 1"),
    *(
        "bench decode --context 99999999999999M",
        f"bench decode --context {'9' * 5000}",
        "bench decode --bits 4",
        "bench decode --methods x",
    ),
    *("serve --host 0.0.0.0", "serve --max-age 0", "serve --disk-mib 5"),
)
"""What can be known to be wrong before a model is loaded, which takes minutes if it is large."""


@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
@pytest.mark.parametrize("name", ["file/deeper.png", "/proc/nothing/x.png"])
def test_an_output_that_cannot_be_written_is_told_at_once(
    words: tuple[str, ...], name: str, ahn_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for work in LOADERS:
        monkeypatch.setattr(work, None)
    done = ahn_cli(*words, tmp_path / name)
    assert done.code == 1 and done.err.startswith("ahn: ") and len(done.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("line", WRONG)
def test_values_are_checked_before_a_model_is_loaded(
    line: str, ahn_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for work in LOADERS:
        monkeypatch.setattr(work, None)
    done = ahn_cli(*line.split())
    assert done.code == 1 and done.err.startswith("ahn: ") and len(done.err.splitlines()) == 1
    assert "[Errno" not in done.err and not list(tmp_path.iterdir())


def test_an_evaluation_that_is_refused_leaves_no_folder(ahn_cli: Any, tmp_path: Path) -> None:
    done = ahn_cli("eval", "needle/fact", "--length", 1, "--out", tmp_path / "results")
    assert done.code == 1 and "Give a greater --length" in done.err
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_training_has_lines_and_no_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train._no_bars(["a.yaml"]) == ["--disable_tqdm", "true"]
    assert train._no_bars(["--disable-tqdm", "false"]) == []
    lines: Any = train._step_lines()
    state = SimpleNamespace(is_world_process_zero=True, global_step=1200, max_steps=5000)
    lines.on_step_end(None, state, None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(common, "PATIENCE", 0.0)
    lines.on_step_end(None, state, None)
    assert capsys.readouterr().err == "step 1,200 of 5,000\n"

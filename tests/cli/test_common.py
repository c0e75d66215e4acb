"""What the verbs share: a progress bar that stays off standard output."""

from __future__ import annotations

import pytest
from rich.table import Table

from ahn.cli import common


def test_progress_stays_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress() as bar:
        bar.advance(bar.add_task("reading", total=2))
    assert capsys.readouterr() == ("", "")  # nor an empty line in a log


def test_without_a_terminal_long_work_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "PATIENCE", 0.0)
    with common.progress() as bar:
        task = bar.add_task("reading [it]", total=2000)
        bar.advance(task, 1500)
        monkeypatch.setattr(common, "PATIENCE", 1e9)
        bar.update(task, completed=1600)
    assert capsys.readouterr() == ("", "reading [it]: 1,500 of 2,000\n")


def test_pairs_on_a_narrow_terminal_keep_their_numbers_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.out, "width", 40)
    common.print_pairs([("remembered (gated_deltanet)", "       2,382 tokens        0.50 MiB"), ("device", "cpu")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["remembered (gated_deltanet)", "  2,382 tokens 0.50 MiB", "device  cpu"]


@pytest.mark.parametrize("width", [20, 40, 80])
def test_tables_keep_their_numbers_whole(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.out, "width", width)
    table = Table("method", box=None, padding=(0, 2, 0, 0))
    table.add_column("facts recalled\n(95% interval)", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right")
    table.add_row("two bits + routed_deltanet", "100% (77-100)", "1,523")
    common.print_tables(table)
    told = capsys.readouterr().out
    assert all(
        text in told for text in ("routed_deltanet", "100% (77-100)", "1,523", "recalled", "interval)", "tokens/s")
    )
    assert "…" not in told

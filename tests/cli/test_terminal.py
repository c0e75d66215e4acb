"""Paths, file contents and model output are no markup and no commands to the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.table import Table

from ahn.cli import common
from ahn.cli.terminal import SafeConsole, visible

HOSTILE = ("x[/b].txt", "[bold]x[/]", "[link=file:///x]x[/link]", "\x1b]0;title\x07", "a\x1b[2Jb", "\x9b31m", ":smile:")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_printed_as_it_is(text: str) -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, width=200, force_terminal=True, color_system=None)
    console.print(f"Results are in {text}")
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    assert file.getvalue().count(visible(text)) == 4
    assert "\x9b" not in file.getvalue() and "\x07" not in file.getvalue()
    assert "\x1b]" not in file.getvalue() and "\x1b[2J" not in file.getvalue()


def test_visible_keeps_text() -> None:
    assert visible("tab\tline\nümlaut 漢字 🙂") == "tab\tline\nümlaut 漢字 🙂"
    assert visible("\x1b[31m\r\x00\x7f\x85") == r"\x1b[31m\x0d\x00\x7f\x85"


def test_the_program_prints_through_them() -> None:
    assert isinstance(common.out, SafeConsole) and isinstance(common.err, SafeConsole)


@pytest.mark.parametrize("terminal", [True, False])
def test_model_output(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ahn.cli.generate import write
    from ahn.cli.session import Sampling

    class Says:
        def write(self, sampling: Sampling, say: Callable[[str], object], interrupt: object) -> str:
            say("a\x1b[2Jb")
            return "a\x1b[2Jb"

    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    text, _ = write(Says(), Sampling(), True, None)
    assert text == "a\x1b[2Jb"  # what is piped on or kept is exact
    assert capsys.readouterr().out == ("a\\x1b[2Jb\n" if terminal else "a\x1b[2Jb\n")

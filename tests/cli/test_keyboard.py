"""Messages from the keyboard, in this process and at a real terminal (a pseudo-terminal with the program behind it)."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import speaking
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from ahn.cli.keyboard import history, history_file, keyboard

PASTE, PASTED = "\x1b[200~", "\x1b[201~"
UP = "\x1b[A"


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("ahn.cli.keyboard.create_output", lambda **options: DummyOutput())
    return tmp_path / "state"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("one\r", "one"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        (f"{PASTE}one\r\ntwo\nthree{PASTED}\r", "one\ntwo\nthree"),
        (f"{PASTE}/quit\nno command{PASTED}!\r", "/quit\nno command!"),
        ("a\\b\r", "a\\b"),
        ("  indented\\\r    more\r", "  indented\n    more"),
    ],
)
def test_what_is_typed(keys: PipeInput, typed: str, message: str) -> None:
    keys.send_text(typed)
    assert keyboard().prompt("> ") == message


def test_control_keys(keys: PipeInput) -> None:
    asked = keyboard()
    keys.send_text("some words\x03")
    with pytest.raises(KeyboardInterrupt):
        asked.prompt("> ")
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        asked.prompt("> ")


def test_history_outlives_the_program_and_is_private(keys: PipeInput, state: Path) -> None:
    keys.send_text("first\\\rof two lines\r")
    keyboard().prompt("> ")
    file = history_file()
    assert file.parent == state / "ahn" and stat.S_IMODE(file.stat().st_mode) == 0o600
    keys.send_text(f"{UP}\r")
    assert keyboard().prompt("> ") == "first\nof two lines"


def test_no_history_file_is_no_reason_to_stop(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.write_text("a file where the directory should be")
    assert isinstance(history(), InMemoryHistory)
    state.unlink()
    kept = history()
    kept.store_string("caf\udce9")  # as a terminal gives a byte that is no UTF-8
    history_file().unlink()
    history_file().mkdir()  # it cannot be written any more
    kept.store_string("x")


class Terminal:
    """The program at a pseudo-terminal, and all that it has shown."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.master, slave = os.openpty()
        code = "from ahn.cli import main; main()"
        variables = os.environ | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=variables, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Everything shown up to the pattern, which is then no longer looked at."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-2000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                new = os.read(self.master, 65536).decode(errors="replace")
                if "\x1b[6n" in new:
                    self.send("\x1b[1;1R")  # where the cursor is, for who asks
                self.shown += new
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def stop(self, pattern: str) -> None:
        """Ctrl-C until the pattern is shown: a key that comes while the program takes the terminal over is a letter."""
        for _ in range(20):
            self.send("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for(pattern, 2)
                return
        raise AssertionError(f"Ctrl-C does not stop: {self.shown[-500:]!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.slow  # seconds of a real terminal, whose timing a loaded machine upsets
def test_at_a_terminal(tmp_path: Path, state: Path) -> None:
    """Ctrl-C stops a reply and what was said is kept, twice; a command's mistake is one line; Ctrl-D leaves."""
    saved = speaking.save(tmp_path, speaking.CHATML)
    (tmp_path / "text.txt").write_text("Call me Ishmael. " * 2000)
    options = ("--model", str(saved.adapter), "--max-new-tokens", "1000000", "--temperature", "1")
    terminal = Terminal("chat", *options, cwd=tmp_path)
    try:
        terminal.wait_for("Ctrl-D leaves")
        for _ in range(2):
            terminal.wait_for(r"\[\?2004h")  # it waits for a line: what is typed before is shown all the same
            terminal.send("Hello\r")
            terminal.wait_for(r"Hello[^\n]*\n")
            terminal.stop(r"\[stopped, [\d,]+ tokens[^]]*\]")
        terminal.send("/read text.txt\r")
        terminal.wait_for(r" [1-9]\d*/\d")  # a piece of it is read
        terminal.stop("is read up to")
        terminal.send("/read none.txt\r")
        terminal.wait_for("No such file")
        terminal.send("/memory\r")
        terminal.wait_for("remembered")
        terminal.wait_for(r"\[\?2004h")
        terminal.send("dropped\x03")
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for(r"\[\?2004h")
        terminal.send("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
    assert "+/memory" in history_file().read_text()

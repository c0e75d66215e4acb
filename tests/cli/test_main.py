"""The program itself: verbs, exit codes, and that help does not wait for a verb's imports."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ahn.cli import main as main_function
from ahn.errors import AHNError

main = sys.modules[main_function.__module__]


def test_help_lists_every_verb(ahn_cli: Any) -> None:
    result = ahn_cli("--help")
    assert result.code == 0
    assert all(f" {verb} " in result.out for verb in main.VERBS)


def test_help_imports_no_verb() -> None:
    code = (
        "import sys, atexit; sys.argv = ['ahn', '--help']\n"
        "from ahn.cli import main\n"
        "heavy = ('ahn.cli.', 'torch', 'transformers')\n"
        "atexit.register(lambda: print('IMPORTED', [m for m in sys.modules if m.startswith(heavy)]))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("IMPORTED ['ahn.cli.main']")


def test_a_wrong_verb_or_option_is_wrong_usage(ahn_cli: Any) -> None:
    result = ahn_cli("inof")
    assert (result.code, result.out) == (2, "")
    assert "Did you mean 'info'" in result.err
    assert ahn_cli("env", "--colour").code == 2


@pytest.mark.parametrize(("raised", "code"), [(AHNError("Two\nlines."), 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int) -> None:
    def command() -> None:
        raise raised

    monkeypatch.setattr(main.importlib, "import_module", lambda name: SimpleNamespace(command=command))
    result = ahn_cli("env")
    assert (result.code, result.out) == (code, "")
    assert result.err.strip() == ("ahn: Two lines." if code == 1 else "")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main.importlib, "import_module", lambda name: SimpleNamespace(command=command))
    monkeypatch.setattr(sys, "argv", ["ahn", "env"])
    with pytest.raises(ZeroDivisionError):
        main_function()


def test_a_thread_that_cannot_be_stopped_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    main._leave_threads(130)
    assert ended == []  # an ordinary end, with all that Python does there
    over = threading.Event()
    threading.Thread(target=over.wait, name=main.ABANDONED, daemon=True).start()
    for code in (130, None, "some text"):
        main._leave_threads(code)
    over.set()
    assert ended == [130, 0, 1]

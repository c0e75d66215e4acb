"""The program itself: verbs, exit codes, and that help does not wait for a verb's imports."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shellingham
import torch

from ahn.cli import main as main_function
from ahn.cli.groups import ARGUMENTS, GROUPS
from ahn.errors import AHNError

main = sys.modules[main_function.__module__]


def test_help_lists_every_verb(ahn_cli: Any) -> None:
    result = ahn_cli("--help")
    assert result.code == 0
    assert all(f" {verb} " in result.out for verb in main.VERBS)


def test_help_is_cut_nowhere(ahn_cli: Any) -> None:
    for words in ((), ("eval",)):
        assert "..." not in ahn_cli(*words, "-h").out.partition("Commands")[2]


def test_a_warning_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main._warn(UserWarning("one\n two\x1b"), UserWarning, __file__, 1)
    assert capsys.readouterr().err == "ahn: one two\\x1b\n"


def test_help_imports_no_verb() -> None:
    code = (
        "import sys, atexit; sys.argv = ['ahn', '--help']\n"
        "from ahn.cli import main\n"
        "heavy = ('ahn.cli.', 'torch', 'transformers')\n"
        "atexit.register(lambda: print('IMPORTED', [m for m in sys.modules if m.startswith(heavy)]))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("IMPORTED ['ahn.cli.groups', 'ahn.cli.terminal', 'ahn.cli.main']")


def test_a_wrong_verb_or_option_is_wrong_usage(ahn_cli: Any) -> None:
    result = ahn_cli("inof")
    assert (result.code, result.out) == (2, "")
    assert "Did you mean 'info'" in result.err
    assert ahn_cli("env", "--colour").code == 2


@pytest.mark.parametrize(("raised", "code"), [(AHNError("Two\nlines."), 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int) -> None:
    def command() -> None:
        raise raised

    monkeypatch.setattr(main, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(command=command)))
    result = ahn_cli("env")
    assert (result.code, result.out) == (code, "")
    assert result.err == ("ahn: Two lines.\n" if code == 1 else "ahn: Stopped.\n")


def test_ctrl_c_amid_an_import_is_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some libraries swallow a KeyboardInterrupt there, and what they miss shows as another error, seconds later."""
    ended: list[int] = []
    monkeypatch.setattr(main.os, "_exit", ended.append)
    monkeypatch.setattr(main.sys, "argv", ["ahn"])  # no verb, and so nothing to go on with
    monkeypatch.syspath_prepend(tmp_path)
    stop = 'import sys\ntry:\n    sys.modules["ahn.cli.main"]._stop(2, sys._getframe())\n'
    (tmp_path / "swallows.py").write_text(f"{stop}except KeyboardInterrupt:\n    pass\n")
    importlib.import_module("swallows")
    assert ended and set(ended) == {130}
    ended.clear()
    with pytest.raises(KeyboardInterrupt):
        main._stop(2, sys._getframe())
    assert not ended
    assert signal.getsignal(signal.SIGINT) is not main._stop, "a program that calls main keeps its own"


def test_ctrl_c_amid_the_first_imports_is_no_traceback() -> None:
    code = (
        "import runpy, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'ahn.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "runpy.run_module('ahn', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (main.STOPPED, "")


def test_ctrl_c_says_how_to_go_on(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(command=command)))
    assert "--resume_from_checkpoint true the same command goes on" in ahn_cli("train").err
    assert "the same command goes on" in ahn_cli("eval").err


def test_short_help_and_version(ahn_cli: Any) -> None:
    assert ahn_cli("-h").out == ahn_cli("--help").out
    assert ahn_cli("eval", "-h").code == ahn_cli("eval", "run", "-h").code == ahn_cli("env", "-h").code == 0
    assert ahn_cli("--version").out.startswith("ahn ")


def test_version_of_sources_that_are_not_installed(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert ahn_cli("--version").out == "ahn unknown\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setattr(shellingham, "detect_shell", lambda *_: (shell, f"/bin/{shell}"))
    assert "_AHN_COMPLETE" in ahn_cli("--show-completion").out


VERBS_WITH_OPTIONS = [
    *((verb,) for verb in main.VERBS if verb not in ("train", "eval")),
    *(("eval", verb) for verb in ("run", "perplexity", "gradients", "list", "report")),
]


@pytest.mark.sample(len(VERBS_WITH_OPTIONS))
@pytest.mark.parametrize("columns", [40, 60, 120])
@pytest.mark.parametrize("verb", VERBS_WITH_OPTIONS, ids=" ".join)
def test_options_have_whole_names_below_headings(
    ahn_cli: Any, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    told = ahn_cli(*verb, "--help").out
    command = main.load(verb[0])
    command = command.commands[verb[1]] if len(verb) > 1 else command
    names = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert [name for name in sorted(names) if name not in told] == []
    headings = re.findall(r"^(?:╭─ )?([A-Z][a-z]+)(?::| ─+╮)$", told.replace("Examples:", ""), flags=re.M)
    expected = [group for group in (ARGUMENTS, *GROUPS) if group in headings]
    assert headings == expected and headings[-1] == "Output", "each once, in order, none left over"
    assert len(names) < 9 or len(headings) > 2


def test_a_tilde_is_the_home_directory_where_no_shell_writes_it_out(
    ahn_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ahn_cli("info", "tiny", "--length", 300, "--plot=~/a.png").code == 0
    assert [path.name for path in (tmp_path / "home").glob("*.png")] == ["a.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "no folder of the name ~"
    assert ahn_cli("info", "tiny", "--plot=~nobody-of-this-name/x").code == 1
    texts = ["--prompt", "~/x", "--system=~", "--api-key=~x", "--json", "x~"]
    assert list(main._at_home(texts)) == texts
    assert list(main._at_home(["c.yaml", "--output_dir=~/x", "~"])) == [
        "c.yaml",
        f"--output_dir={tmp_path}/home/x",
        f"{tmp_path}/home",
    ]


def _shell(command: str) -> subprocess.CompletedProcess[str]:
    program = f"{sys.executable} -m ahn"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("AHN", program)], capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize(
    ("command", "told"),
    [("AHN --help > /dev/full", "No space left"), ("AHN --help >&-", "closed"), ("AHN --help | true", "")],
)
def test_output_that_cannot_be_written(command: str, told: str) -> None:
    done = _shell(command)
    assert done.returncode in ((1,) if told else (0, 1))  # who reads may end before or after all is written
    assert told in done.stderr and len(done.stderr.splitlines()) == bool(told), done.stderr


def test_streams_that_are_closed() -> None:
    done = _shell("AHN --version <&- 2>&-")
    assert (done.returncode, done.stdout[:4]) == (0, "ahn ")


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_full_memory_is_one_line(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    def command() -> None:
        raise raised

    monkeypatch.setattr(main, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(command=command)))
    result = ahn_cli("env")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("ahn: The device has not enough memory") and result.err.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(command=command)))
    monkeypatch.setattr(sys, "argv", ["ahn", "env"])
    with pytest.raises(ZeroDivisionError):
        main_function()


def test_after_ctrl_c_the_end_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after Python has taken apart what was imported; nor after a thread that cannot be stopped."""
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    main._leave(0)
    main._leave(1)
    assert ended == []  # an ordinary end, with all that Python does there
    main._leave(main.STOPPED)
    assert ended == [130]
    ended.clear()
    over = threading.Event()
    threading.Thread(target=over.wait, name=main.ABANDONED, daemon=True).start()
    for code in (None, "some text"):
        main._leave(code)
    over.set()
    assert ended == [0, 1]

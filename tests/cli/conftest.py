"""Running the program inside the test process, as a shell would see it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable

import pytest

from ahn.cli import main


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run of the program ended, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def ahn_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`ahn_cli("info", path, "--json")` runs `ahn info path --json`."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(os, "_exit", sys.exit)  # as after Ctrl-C, which would end the tests
        monkeypatch.setattr(sys, "argv", ["ahn", *(str(argument) for argument in arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Run(int(exit_.value.code or 0), captured.out, captured.err)

    return run

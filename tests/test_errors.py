"""Messages name a command that installs what is missing, for how this package was installed."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from types import SimpleNamespace

import pytest

from ahn.errors import first_line, install_command

REQUIRES = [
    "torch>=2",
    'jieba==0.42.1; extra == "eval"',
    "ahn[eval]; extra == 'all'",
    "lm-eval[ruler]>=0.4; extra == 'all'",
    "triton>=3; (platform_system == 'Linux') and extra == 'dev'",
]


@pytest.mark.parametrize(
    ("url", "extra", "command"),
    [
        ('{"dir_info": {"editable": true}, "url": "file:///home/me/a%20b/ahn"}', "eval", "-e '/home/me/a b/ahn[eval]'"),
        (None, "eval", "jieba==0.42.1"),
        ('{"url": "https://example.org/ahn.whl"}', "all", "jieba==0.42.1 'lm-eval[ruler]>=0.4'"),
        (None, "dev", "'triton>=3'"),
    ],
)
def test_install_command(url: str | None, extra: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(read_text=lambda name: url, requires=REQUIRES)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    monkeypatch.setattr(sys, "executable", "/home/me/a b/bin/python")
    monkeypatch.setattr(shutil, "which", lambda name: "/home/me/a b/bin/pip")
    assert install_command(extra) == f"pip install {command}"
    for pip in (None, "/usr/bin/pip"):  # the environment is not activated: another's pip would take it elsewhere
        monkeypatch.setattr(shutil, "which", lambda name, pip=pip: pip)
        assert install_command(extra) == f"'/home/me/a b/bin/python' -m pip install {command}"


def test_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert "checkout" in install_command("train")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("One.\nTwo."), "One"),
        (ValueError(), "ValueError"),
        (KeyError("zzz"), "'zzz' is unknown or missing"),
        (KeyError(7), "7 is unknown or missing"),
        (KeyError("Missing keys: factor.\nMore."), "Missing keys: factor"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_exception_is_a_line(error: Exception, line: str) -> None:
    assert first_line(error) == line

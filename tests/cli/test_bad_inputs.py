"""What people type wrong: over all verbs, one clear line and the right exit code, and never a traceback."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import speaking

NUMBERS = ("", "x", "-1", "1.5", "1e3", "nan", "١x", "0x10", " ", "--")
PATHS = ("{none}", "{folder}", "{binary}", "{empty}", "{long}", "{device}", "~nobody-of-this-name/x")
MODELS = ("{none}", "{binary}", "{empty}", "{folder}", "{list}", "{deep}", "{text}", "{long}", "a/b/c", "")
INTEGERS = {
    "generate": ("--window", "--sinks", "--quantized", "--max-new-tokens", "--seed", "--prompt-lookup"),
    "chat": ("--window", "--sinks", "--quantized", "--max-new-tokens"),
    "inspect": ("--window", "--length"),
    "demo": ("--documents", "--length"),
    "eval perplexity": ("--window", "--book"),
    "eval needle": ("--limit", "--samples"),
    "bench decode": ("--new-tokens", "--context", "--batch"),
}
NAMES = {
    "generate": ("--device", "--dtype", "--adapter"),
    "eval perplexity": ("--method", "--dtype", "--device"),
    "bench decode": ("--methods", "--dtype", "--device"),
}


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Words after `ahn`; names in braces are files of `places`."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


def mistakes() -> Iterator[Mistake]:
    """All of them: wrong numbers, wrong names, things that are no model or text, wrong combinations."""
    for verb, options in INTEGERS.items():
        for option in options:
            for value in NUMBERS:
                if not (option == "--seed" and value == "-1"):  # a seed may be negative
                    yield _mistake(verb, option, value)
    for verb, options in NAMES.items():
        for option in options:
            for value in ("nonsense", "cuda:99", "", "float8", "-x", "a,b"):
                yield _mistake(verb, option, value)
    for value in MODELS:
        yield _mistake("generate", "--prompt", "x", "--model", value)
        yield _mistake("chat", "--model", value)
        yield _mistake("info", value)
        yield _mistake("split", "--model", value, "--output-path", "{none}")
        yield _mistake("merge", "--base-model", value, "--ahn-path", "{adapter}", "--output-path", "{none}")
        yield _mistake("merge", "--base-model", "{base}", "--ahn-path", value, "--output-path", "{none}")
        yield _mistake("eval perplexity", "--model", value)
    for value in PATHS:
        yield _mistake("generate", "--file", value)
        yield _mistake("inspect", "--text", value)
        yield _mistake("eval perplexity", "--text", value)
    for value in ("-0.1", "nan", "inf", "x", "-inf"):
        yield _mistake("generate", "--prompt", "x", "--temperature", value)
        yield _mistake("chat", "--top-p", value)
    yield _mistake("generate", "--prompt", "x", "--seed", str(1 << 64))
    yield _mistake("generate", "--prompt", "caf\udce9")
    yield _mistake("generate", "--prompt", "")
    yield _mistake("eval perplexity", "--dtype=")
    for verb in ("nonsense", "generat", "--nonsense", "generate --nonsense", "env extra", "eval", "bench nonsense"):
        yield _mistake(verb)


def _mistake(verb: str, *words: str) -> Mistake:
    return Mistake((*verb.split(), *words))


ALL = list(mistakes())
STEP = 12
"""Of so many mistakes one is made by default."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bad")
    saved = speaking.save(folder)
    contents = {"binary": b"\xff\xfe\x00", "empty": b"", "text": b"no JSON", "list": b"[]", "deep": b"[" * 100_000}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    found = {name: str(folder / name) for name in (*contents, "folder", "none")}
    return found | {"long": "x" * 300, "base": str(saved.base), "adapter": str(saved.adapter), "device": "/dev/full/x"}


def test_there_are_enough_of_them() -> None:
    assert len({str(mistake) for mistake in ALL}) >= 200


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, id=str(n), marks=[] if n % STEP == 0 else [pytest.mark.slow]) for n, m in enumerate(ALL)],
)
def test_one_clear_line(
    ahn_cli: Any, mistake: Mistake, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    done = ahn_cli(*(places.get(word[1:-1], word) if word.startswith("{") else word for word in mistake.words))
    assert done.code in (1, 2) and "Traceback" not in done.err
    told = [line for line in done.err.splitlines() if line.startswith("ahn: ")]
    assert (len(told) == 1 and len(told[0]) < 1000) if done.code == 1 else "Usage" in done.err, done.err
    assert list(tmp_path.iterdir()) == [], "refused, but something was written"


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--max-new-tokens", "1", "--file", "{null}"),
        ("inspect", "--text", "{null}"),
        ("eval", "perplexity", "--text", "{null}"),
        ("generate", "--prompt", "x", "--model", "{config}"),
        ("generate", "--prompt", "x", "--model", "{weights}"),
        ("info", "{config}"),
    ],
    ids=" ".join,
)
def test_devices_are_not_read(
    ahn_cli: Any, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/null stands for /dev/zero, which never ends: the memory of the machine did."""
    monkeypatch.chdir(tmp_path)
    for name in ("config", "weights"):
        (tmp_path / name).mkdir()
    (tmp_path / "config" / "config.json").symlink_to("/dev/null")
    (tmp_path / "weights" / "model.safetensors").symlink_to("/dev/null")
    (tmp_path / "weights" / "config.json").write_text("{}")
    places = {name: str(tmp_path / name) for name in ("config", "weights")} | {"null": "/dev/null"}
    done = ahn_cli(*(word.format(**places) for word in words))
    assert done.code == 1 and re.search("^ahn: .* is not a file[.]$", done.err, flags=re.M), done.err

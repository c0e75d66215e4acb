"""Blocks of code in documents: what they are, and how to run those of a document as a reader would paste them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LANGUAGES = ("bash", "json", "python", "text", "toml", "yaml")
"""Of blocks; those in bash and python run."""
_BLOCK = re.compile(
    r"^(?P<mark> *<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    flags=re.M | re.S,
)
_RUNNER = """
import json, subprocess, sys
namespace = {"__name__": "document"}
for language, line, code in json.load(sys.stdin):
    print(f"line {line}:", file=sys.stderr, flush=True)
    if language == "python":
        exec(compile("\\n" * line + code, "document", "exec"), namespace)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True, stdin=subprocess.DEVNULL)
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a document, or Python in a comment `<!-- setup`, which readers do not see."""

    language: str
    line: int
    code: str
    not_run: str | None
    """Why `<!-- not run: … -->` before it says that it is not run here."""


def blocks(document: Path) -> list[Block]:
    """In order."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        if match["setup"] is not None:
            found.append(Block("python", line, match["setup"], None))
        else:
            found.append(Block(match["language"], line, textwrap.dedent(match["code"]), match["reason"]))
    return found


def runs(document: Path) -> list[Block]:
    """Its blocks that are run here."""
    return [block for block in blocks(document) if block.language in ("bash", "python") and block.not_run is None]


def run(document: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a document's blocks in order, Python in one interpreter, where files of a checkout are in reach."""
    for name in ("benchmarks", "configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    given = json.dumps([(block.language, block.line, block.code) for block in runs(document)])
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    return subprocess.run(
        [sys.executable, "-c", _RUNNER],
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def commands(code: str) -> list[list[str]]:
    """The words of each `ahn …` in shell code, from its verb on."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"\|\||&&|[|;]", line):
            words = shlex.split(part.replace("$(which ahn)", "ahn"), comments=True)
            if "ahn" in words[:-1] and not words[words.index("ahn") - 1].startswith("--model"):
                found.append(words[words.index("ahn") + 1 :])
    return found


def unknown_options(words: list[str]) -> list[str]:
    """Options of an `ahn` command line that its verb does not have."""
    from ahn.cli.main import VERBS, load

    verb, *rest = words
    if verb not in VERBS:
        return [] if verb.startswith("-") else [verb]
    given = [word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)]
    if verb == "train":
        from ahn.training.arguments import Parser

        return [one for one in given if one[2:].replace("-", "_") not in Parser().names]
    command: Any = load(verb)
    inner = getattr(command, "commands", {})
    found = [command, inner[rest[0]]] if rest and rest[0] in inner else [command, *inner.values()]
    known = {name for one in found for option in one.params for name in (*option.opts, *option.secondary_opts)}
    return [one for one in given if one not in known]

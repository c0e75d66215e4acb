"""`ahn inspect`: its tables, its figures, and what it says when there is nothing to see."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import speaking

from ahn.cli.inspect import _interval
from ahn.inspect import KINDS
from ahn.inspect.kinds import Mean

WINDOW, SINKS = speaking.WINDOW, speaking.SINKS


def test_the_verb(ahn_cli: Any, tmp_path: Path) -> None:
    saved = speaking.save(tmp_path / "model")
    text = tmp_path / "own [1].py"
    text.write_text("def main(x):\n    return x + 17  # a note\n" * 60)
    own = ("inspect", "--model", saved.base, "--adapter", saved.adapter, "--text", text, "--out", tmp_path / "out")
    options = ("--window", WINDOW, "--sinks", SINKS, "--length", 500)
    done = ahn_cli(*own, *options, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [row["layer"] for row in result["layers"]] == [0, 1]
    assert all(len(row["half_lives"]) == 4 and row["read_share"] > 0 for row in result["layers"])
    assert {entry["kind"] for entry in result["kinds"]} == set(KINDS) - {"other"}
    assert sum(entry["tokens"] for entry in result["kinds"]) == result["written"] == 500 - WINDOW - SINKS
    for path in result["figures"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    shown = ahn_cli(*own, *options)
    for words in ("own [1].py", "484 of them left the window", "remember", "keyword"):
        assert words in " ".join(shown.out.split())
    short = ahn_cli(*own, "--window", 5000)
    assert short.code == 1 and "all stay exact" in short.err


def test_a_mean_of_one_block_of_text_has_no_interval() -> None:
    assert _interval(Mean(0.2413, math.nan, math.nan), 3) == "0.241"
    assert _interval(Mean(0.2413, 0.23, 0.25), 2) == "0.24 (0.23-0.25)"

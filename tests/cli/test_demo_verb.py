"""`ahn demo`: what it prints, what it writes, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import speaking

from ahn.demo.methods import FULL, WINDOW_ONLY

WINDOW, SINKS = speaking.WINDOW, speaking.SINKS
LOSSLESS = WINDOW + SINKS
LENGTH = 200


def test_the_verb(ahn_cli: Any, tmp_path: Path) -> None:
    saved = speaking.save(tmp_path / "model")
    options = ("--window", WINDOW, "--sinks", SINKS, "--length", LENGTH, "--documents", 2)
    own = ("--model", saved.base, "--adapter", saved.adapter, *options)
    done = ahn_cli("demo", *own, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [entry["name"] for entry in result["results"]] == [FULL, WINDOW_ONLY, "gated_deltanet"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert result["continuation"]["text"]

    shown = ahn_cli("demo", *own, "--out", tmp_path / "out")
    for text in ("reads 2 documents", "sinks + window", "gated_deltanet writes on", "figure.png"):
        assert text in " ".join(shown.out.split())


def test_the_verb_with_quantized_tokens(ahn_cli: Any, tmp_path: Path) -> None:
    saved = speaking.save(tmp_path / "model")
    options = ("--window", WINDOW, "--sinks", SINKS, "--length", LENGTH, "--documents", 1, "--quantized", 24, "--json")
    done = ahn_cli("demo", "--model", saved.base, "--adapter", saved.adapter, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    assert [entry["name"] for entry in results] == [FULL, WINDOW_ONLY, "+ 24 at two bits", "gated_deltanet"]
    assert [entry["is_memory"] for entry in results] == [False, False, True, True]
    assert results[2]["cache_bytes"] > results[1]["cache_bytes"]


def test_the_verb_on_a_text_of_ones_own(ahn_cli: Any, tmp_path: Path) -> None:
    saved = speaking.save(tmp_path / "model")
    text = tmp_path / "own.txt"
    text.write_text("a [bold] line with [/] brackets\n" * 40)
    options = ("demo", "--model", saved.adapter, "--window", WINDOW, "--sinks", SINKS, "--out", tmp_path / "out")
    done = ahn_cli(*options, "--text", text, "--length", 2 * LOSSLESS, "--documents", 1)
    assert done.code == 0, done.err
    assert "own.txt" in done.out and "[bold]" in done.out
    assert ahn_cli(*options, "--text", tmp_path / "none").code == 1
    short = ahn_cli(*options, "--text", text, "--length", 100_000)
    assert short.code == 1 and "smaller --length" in short.err

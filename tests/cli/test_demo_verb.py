"""`ahn demo`: what it prints, what it writes, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import speaking

from ahn import tiny
from ahn.cli import demo
from ahn.cli.common import out
from ahn.cli.demo import BEST
from ahn.demo.methods import FULL, WINDOW_ONLY

WINDOW, SINKS = speaking.WINDOW, speaking.SINKS
LOSSLESS = WINDOW + SINKS
LENGTH = 120

FEW_BITS = "4/2 bits"  # of new memories; those that ship are from before there were more than two


def test_the_verb(ahn_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NEW_TOKENS", 16)
    saved = speaking.save(tmp_path / "model")
    options = ("--window", WINDOW, "--sinks", SINKS, "--length", LENGTH)
    own = ("--model", saved.base, "--adapter", saved.adapter, *options)
    done = ahn_cli("demo", *own, "--documents", 1, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    names = [FULL, WINDOW_ONLY, "gated_deltanet", FEW_BITS, f"{FEW_BITS} + gated_deltanet"]
    assert [entry["name"] for entry in result["results"]] == names
    assert result["quantized"] == 42  # 3.5 windows
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert result["continuation"]["text"]

    shown = ahn_cli("demo", *own, "--documents", 2, "--quantized", LENGTH, "--out", tmp_path / "out")
    for text in (
        "reads 2 documents",
        "sinks + window",
        "writes on after",
        f"4/2 bits: also the {LENGTH} tokens",
        "the memory behind 4/2 bits got nothing",
        "figure.png",
    ):
        assert text in " ".join(shown.out.split())
    introduced = shown.out.strip().partition("\n\n")[0].splitlines()
    assert len(introduced) > 1 and max(map(len, introduced)) <= out.width


def test_memories_that_are_named_are_those_that_are_shown(ahn_cli: Any, tmp_path: Path) -> None:
    subject = demo._subject(demo.TINY, ["deltanet"], None, (224, 32), 0, 512, 1, None, None)
    assert [method.name for method in subject.methods] == [FULL, WINDOW_ONLY, "deltanet"]
    done = ahn_cli("demo", "--model", "tiny", "--adapter", tmp_path / "none", "--length", 512, "--out", tmp_path / "x")
    assert done.code == 1 and "none" in done.err


@pytest.mark.slow
def test_the_model_that_ships_is_read_with_every_memory_that_ships(ahn_cli: Any, tmp_path: Path) -> None:
    done = ahn_cli("demo", "--length", 512, "--documents", 1, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found = [entry["name"] for entry in json.loads(done.out)["results"]]
    others = [memory for memory in tiny.adapters() if memory != BEST]
    assert found == [FULL, WINDOW_ONLY, BEST, *others, "two bits", f"two bits + {BEST}"]


@pytest.mark.slow
def test_the_verb_with_quantized_tokens(ahn_cli: Any, tmp_path: Path) -> None:
    saved = speaking.save(tmp_path / "model")
    options = ("--window", WINDOW, "--sinks", SINKS, "--length", LENGTH, "--documents", 1, "--out", tmp_path / "out")
    own = ("demo", "--model", saved.base, "--adapter", saved.adapter, "--adapter", saved.adapter, *options, "--json")

    def results(tokens: int) -> list[dict[str, Any]]:
        done = ahn_cli(*own, "--quantized", tokens)
        assert done.code == 0, done.err
        result = json.loads(done.out)
        assert result["quantized"] == tokens
        return result["results"]

    without, some, more = results(0), results(24), results(48)
    memories = ["gated_deltanet #1", "gated_deltanet #2"]
    assert [entry["name"] for entry in without] == [FULL, WINDOW_ONLY, *memories]
    names = [FULL, WINDOW_ONLY, *memories, FEW_BITS, f"{FEW_BITS} + gated_deltanet"]
    assert [entry["name"] for entry in some] == [entry["name"] for entry in more] == names
    assert [entry["is_memory"] for entry in some] == [False, False, True, True, True, True]
    for none, few, many in zip(without, some, more, strict=False):
        assert none["loss"] == few["loss"] == many["loss"]  # the rows without quantized tokens do not see them
    # A number of a key takes 4 bits, of a value 2, a vector of 8 one bfloat16 more, and a memory's gates wait in the
    # cache as long as the token does: what 24 more tokens cost.
    packed = 24 * 2 * 2 * ((8 // 2 + 2) + (8 // 4 + 2))
    gates = 24 * 2 * 2 * 4 * 4
    grown = [many["cache_bytes"] - few["cache_bytes"] for few, many in zip(some, more, strict=True)]
    assert grown == [0, 0, 0, 0, packed, packed + gates]
    assert some[4]["loss"] != more[4]["loss"] and some[5]["loss"] != more[5]["loss"]


@pytest.mark.slow
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

"""Needles lie where the grid says, and only their own answers count."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from word_tokenizer import WordTokenizer

from ahn import tiny
from ahn.errors import AHNError
from ahn.evaluation import methods, runner
from ahn.evaluation.task import Sample
from ahn.evaluation.tasks import names, needle, tasks
from ahn.tiny import facts

LENGTHS, DEPTHS = (600, 2000), (0.0, 25.0, 50.0, 100.0)


def task(kind: str, **options: Any) -> needle.Needle:
    given = {"tokenizer": WordTokenizer(), "lengths": LENGTHS, "depths": DEPTHS, "samples": 2} | options
    (found,) = tasks(f"needle/{kind}", **given)
    assert isinstance(found, needle.Needle)
    return found


def place(sample: Sample, kind: str) -> float:
    """Where the asked needle lies, as a share of the text."""
    value = re.escape(sample.answers[0])
    if kind == "number":
        before, after = re.split(rf"One of the special magic numbers for \S+ is: {value}\.", sample.prompt)
    else:
        key = sample.prompt.rpartition(" ")[2]
        before, after = re.split(rf"# note: {key} {value}\n", sample.prompt)
    return len(before) / len(before + after)


@pytest.mark.parametrize("kind", needle.KINDS)
def test_every_cell_of_the_grid_is_asked(kind: str) -> None:
    found = task(kind)
    samples = list(found.samples())
    assert samples == list(found.samples()) == list(task(kind).samples())
    assert len({sample.id for sample in samples}) == len(samples) == 2 * 2 * 4
    for sample in samples:
        tokens = len(WordTokenizer()(sample.prompt)["input_ids"]) + found.max_new_tokens
        assert 0.9 * sample.extra["length"] < tokens <= sample.extra["length"]
        # Other needles, the question and the last sentence shift a needle by some percent of a short text.
        assert place(sample, kind) == pytest.approx(sample.extra["depth"] / 100, abs=0.14)
    assert samples != list(task(kind, seed=1).samples())


@pytest.mark.parametrize("kind", needle.KINDS)
def test_needles_of_one_text_share_all_but_the_question(kind: str) -> None:
    by_text: dict[str, list[str]] = {}
    for sample in task(kind).samples():
        by_text.setdefault(sample.context, []).append(sample.prompt)
    assert len(by_text) == len(LENGTHS) * 2
    for prompts in by_text.values():
        assert len(set(prompts)) == len(DEPTHS)
        shared = next(n for n, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
        assert shared > len(prompts[0]) - 200  # what differs is the question at the end


@pytest.mark.parametrize("kind", needle.KINDS)
def test_only_the_right_answer_scores(kind: str) -> None:
    found = task(kind)
    first, second = list(found.samples())[:2]
    assert found.score(f" {first.answers[0]}\n", first) == 1
    assert found.score("", first) == found.score(second.answers[0], first) == 0
    if kind == "fact":  # the next word must be it
        assert found.score(f"not {first.answers[0]}", first) == 0


def test_facts_are_asked_as_ahn_tiny_was_taught() -> None:
    for sample in task("fact").samples():
        question = sample.prompt.rpartition("\n")[2]
        key = question.removeprefix("# recall: ")
        assert facts.QUESTION.format(key=key, value="x") == f"{question} x\n"
        assert facts.STATEMENT.format(key=key, value=sample.answers[0]) in sample.prompt
    assert task("fact").stops == ("\n",)


def test_the_summary_is_a_grid() -> None:
    rows = [
        {"score": score, "extra": {"length": length, "depth": depth}}
        for length, depth, score in [(600, 0.0, 1.0), (600, 0.0, 0.0), (600, 50.0, 1.0), (2000, 0.0, 0.0)]
    ]
    assert task("number").summary(rows) == {
        "score": 50.0,
        "grid": [
            {"length": 600, "depth": 0.0, "score": 50.0, "samples": 2},
            {"length": 600, "depth": 50.0, "score": 100.0, "samples": 1},
            {"length": 2000, "depth": 0.0, "score": 0.0, "samples": 1},
        ],
    }


def test_hidden_between_units() -> None:
    units = ["a" * 10, "b" * 10, "c" * 20]
    assert needle.hide(["S", "M", "E"], units, [0, 50, 100]) == ["S", units[0], units[1], "M", units[2], "E"]
    assert needle.hide(["E", "S"], units, [100, 0]) == ["S", *units, "E"]
    assert needle.hide(["N"], [], [50]) == ["N"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ahn", "window", "full"])
def test_the_shipped_model_finds_what_its_memory_keeps(method: str, tmp_path: Path) -> None:
    adapter = str(tiny.adapter_path("deltanet"))
    evaluated = methods.load(method, str(tiny.path()), adapter, window=224, sinks=32, device="cpu")
    options = {"tokenizer": evaluated.tokenizer, "lengths": (1024,), "depths": (20.0, 40.0, 60.0, 95.0), "samples": 4}
    (result,) = runner.run(tasks("needle/fact", **options), evaluated, tmp_path)
    found = {cell["depth"]: cell["score"] for cell in result["grid"]}
    beyond = sum(found[depth] for depth in (20.0, 40.0, 60.0)) / 3
    # The card: of facts beyond the window 90 % with this memory, 3 % without, 100 % with full attention. Of 12 needles
    # 9 at least, and 3 at most: each is missed with a chance below 3 %, and nothing here is left to chance twice.
    assert beyond <= 25 if method == "window" else beyond >= 75
    assert found[95.0] >= 50  # still in the window


def test_names_and_errors() -> None:
    assert {"needle/number", "needle/fact"} <= set(names())
    assert [task.name for task in tasks("needle", tokenizer=WordTokenizer())] == ["needle/number"]
    with pytest.raises(AHNError, match="needle"):
        tasks("needle/pin", tokenizer=WordTokenizer())
    with pytest.raises(AHNError, match="128 keys"):
        task("number", depths=tuple(n / 2 for n in range(200)))
    with pytest.raises(AHNError, match="20 tokens"):
        list(task("number", lengths=(20,)).samples())

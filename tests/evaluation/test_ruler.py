"""RULER's tasks: what they ask can be answered from what they show, at the length that was asked for."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from word_tokenizer import WordTokenizer

from ahn.errors import AHNError
from ahn.evaluation import methods, runner
from ahn.evaluation.task import Sample
from ahn.evaluation.tasks import check, ruler, tasks

GENERATED = [task for task in ruler.TASKS if not task.startswith("qa")]
COUNT = WordTokenizer()


def task(name: str, length: int = 1000, template: bool = False, **options: Any) -> ruler.Ruler:
    (found,) = tasks(f"ruler/{name}", tokenizer=WordTokenizer(template), lengths=(length,), samples=3, **options)
    assert isinstance(found, ruler.Ruler)
    return found


def samples(name: str, length: int = 1000, **options: Any) -> list[Sample]:
    return list(task(name, length, **options).samples())


@pytest.mark.sample(11)
@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("length", [700, 5000])
def test_prompts_fill_the_length(name: str, length: int) -> None:
    found = task(name, length)
    for sample in found.samples():
        tokens = len(COUNT(sample.prompt)["input_ids"]) + found.max_new_tokens
        assert 0.93 * length < tokens <= length  # a line of noise is 3 % of 700 words, and two samples may lose one


@pytest.mark.parametrize("name", GENERATED)
def test_samples_are_the_same_in_every_run_and_differ_from_each_other(name: str) -> None:
    first, again, other = samples(name), samples(name), samples(name, seed=1)
    assert first == again
    found = task(name)
    assert list(found.samples()) == list(found.samples()) == first  # the second time without counting tokens
    assert len({sample.prompt for sample in first + other}) == 6
    assert [sample.id for sample in first] == ["0", "1", "2"]


@pytest.mark.parametrize("name", GENERATED)
def test_only_the_answers_score(name: str) -> None:
    found = task(name)
    for sample in found.samples():
        assert len(set(sample.answers)) == len(sample.answers)
        assert found.score(f"They are: {'; '.join(sample.answers).upper()}.", sample) == 1
        assert found.score(sample.answers[0], sample) == pytest.approx(1 / len(sample.answers))
        assert found.score("I do not know.", sample) == 0


NEEDLE = re.compile(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.(?:\s|$)")


@pytest.mark.parametrize(
    ("name", "kind", "needles", "asked", "answers"),
    [
        ("niah_single_1", "number", 1, 1, 1),
        ("niah_single_2", "number", 1, 1, 1),
        ("niah_single_3", "uuid", 1, 1, 1),
        ("niah_multikey_1", "number", 4, 1, 1),
        ("niah_multivalue", "number", 4, 1, 4),
        ("niah_multiquery", "number", 4, 4, 4),
    ],
)
def test_needles_hold_the_answers(name: str, kind: str, needles: int, asked: int, answers: int) -> None:
    for sample in samples(name):
        found = NEEDLE.findall(sample.prompt)
        assert len(found) == needles and {needle[0] for needle in found} == {kind}
        question = sample.prompt.rpartition("\n")[2]
        keys = [key for key in dict.fromkeys(needle[1] for needle in found) if key in question]
        assert len(keys) == asked
        assert {value for _, key, value in found if key in keys} == set(sample.answers)
        assert len(sample.answers) == answers


@pytest.mark.parametrize(("name", "shape"), [("niah_multikey_2", r"\d{7}"), ("niah_multikey_3", r"[0-9a-f-]{36}")])
def test_a_haystack_of_needles_has_the_asked_key_once(name: str, shape: str) -> None:
    for sample in samples(name, 5000):
        found = NEEDLE.findall(sample.prompt)
        question = sample.prompt.rpartition("\n")[2]
        assert len(found) > 100
        assert [value for _, key, value in found if f"for {key} " in question] == list(sample.answers)
        assert re.fullmatch(shape, sample.answers[0])


def test_several_keys_are_listed_as_in_the_benchmark() -> None:
    question = samples("niah_multiquery")[0].prompt.rpartition("\n")[2]
    assert re.match(r"What are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned in the", question)


def test_needles_spread_over_an_essay() -> None:
    depths = [
        sample.prompt.index("One of the special") / len(sample.prompt)
        for seed in range(12)
        for sample in samples("niah_single_2", seed=seed)
    ]
    # 36 depths drawn evenly from 0 to 100 %: all in one half has a chance of 2^-35.
    assert min(depths) < 0.5 < max(depths)


def test_the_haystack_can_be_a_file_or_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.txt").write_text("Second book. " * 3)
    (tmp_path / "a.txt").write_text("First book. " * 3)
    (tmp_path / "c.md").write_text("Not read.")
    one, both = (samples("niah_single_2", haystack=path)[0].prompt for path in (tmp_path / "a.txt", tmp_path))
    assert "Second" not in one and one.count("First book.") > 100  # it is begun again until the prompt is full
    assert both.index("First") < both.index("Second") and "Not read" not in both
    settings = [task("niah_single_2", haystack=path).settings()["haystack"] for path in (tmp_path / "a.txt", tmp_path)]
    assert settings[0]["sha256"] != settings[1]["sha256"]
    with pytest.raises(AHNError, match=r"nothing\.txt"):
        samples("niah_single_2", haystack=tmp_path / "nothing.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert task("niah_single_2", haystack=Path("~/a.txt")).settings()["haystack"] == settings[0]


def test_the_chain_of_variables_leads_to_the_answers() -> None:
    for sample in samples("vt"):
        example, _, asked = sample.prompt.rpartition("Memorize and track")
        value = re.findall(r"assigned the value (\d+)", asked)[0]
        chain = [name for name, _ in re.findall(r"VAR ([A-Z]{5}) = (\d+|VAR [A-Z]{5})", asked)]
        assert re.search(rf"VAR {chain[0]} = {value}\n", asked)
        for name, before in zip(chain[1:], chain, strict=False):
            assert f"VAR {name} = VAR {before}" in asked
        assert tuple(chain) == sample.answers
        assert "they are:  " in example  # the example is solved
        assert not set(sample.answers) & set(re.findall(r"[A-Z]{3,}", example))


@pytest.mark.parametrize("length", [900, 5000])
def test_common_words_are_the_most_common(length: int) -> None:
    for sample in samples("cwe", length):
        example, _, asked = sample.prompt.rpartition("Below is a numbered list")
        counts = Counter(re.findall(r"\d+\. (\S+)", asked)).most_common()
        assert {word for word, _ in counts[:10]} == set(sample.answers)
        assert [count for _, count in counts[9:11]] == ([30, 3] if length > 4096 else [6, 1])
        assert example.count("Answer:") == 1


def test_frequent_words_are_the_most_frequent() -> None:
    for sample in samples("fwe", 5000):
        text = sample.prompt.partition("coded words. ")[2].partition("\nQuestion")[0]
        counts = Counter(text.split()).most_common(4)
        assert [word for word, _ in counts] == ["...", *sample.answers]
        # Zipf's law with exponent 2: the second word comes a quarter as often as the first.
        assert counts[1][1] == pytest.approx(counts[0][1] / 4, rel=0.02)


def test_the_answer_begins_in_the_models_turn() -> None:
    (plain, *_), (templated, *_) = samples("niah_single_1"), samples("niah_single_1", template=True)
    message, _, prefix = templated.prompt.removeprefix("<user>").partition("<model>")
    assert message.endswith("provided text?") and prefix.startswith(" The special magic number for ")
    assert plain.prompt.endswith(prefix) and not task("niah_single_1").chat_template


def test_settings_tell_configurations_apart() -> None:
    settings = [
        json.dumps(task("niah_single_2", **options).settings())
        for options in ({}, {"seed": 1}, {"length": 2000}, {"template": True})
    ]
    assert len(set(settings)) == 4


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", ["ahn", "window", "full"])
def test_a_run_from_end_to_end(method: str, tiny: tuple[str, str], tmp_path: Path) -> None:
    evaluated = methods.load(method, *tiny, device="cpu")
    found = tasks("ruler/vt/3000", tokenizer=evaluated.tokenizer, samples=2)
    (result,) = runner.run(found, evaluated, tmp_path)
    assert (result["samples"], result["method"]) == (2, method) and 0 <= result["score"] <= 100
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["prompt_tokens"] + 30 <= 3000 and row["new_tokens"] == 30 and not row["shortened"]
        assert row["score"] == found[0].score(row["prediction"], Sample("", "", "", tuple(row["answers"])))


def test_names_and_lengths() -> None:
    def found(spec: str, **options: Any) -> list[str]:
        return [task.name for task in tasks(spec, tokenizer=COUNT, **options)]

    assert found("ruler/vt") == [f"ruler/vt/{level}" for level in ruler.LEVELS]
    assert found("ruler/4k") == [f"ruler/{name}/4k" for name in GENERATED]
    assert found("ruler/vt/2k", lengths=(512,)) == ["ruler/vt/2k"]
    assert found("ruler/vt", lengths=(512, 2048)) == ["ruler/vt/512", "ruler/vt/2k"]
    assert set(found("ruler")) == {name for name in ruler.names() if "/qa_" not in name}
    for spec in ("ruler", "ruler/vt", "ruler/4k", "ruler/vt/4k", "ruler/vt/3000", "ruler/2k"):
        check(spec)  # before a model is loaded
    for wrong in ("ruler/sum", "ruler/vt/long", "ruler/vt/4k/x"):
        with pytest.raises(AHNError):
            found(wrong)


def test_a_length_without_room_is_an_error() -> None:
    with pytest.raises(AHNError, match="ruler/vt/100"):
        samples("vt", 100)
    with pytest.raises(AHNError, match="tokenizer"):
        tasks("ruler/vt/4k")


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Article {article}, paragraph {n}. The colour is {colour}.",
                    "qas": [
                        {"question": f"Which colour, {article}.{n}?", "is_impossible": False}
                        | {"answers": [{"text": colour}, {"text": f"it is {colour}"}]},
                        {"question": "Impossible?", "is_impossible": True, "answers": []},
                    ],
                }
                for n, colour in enumerate(["red", "green"])
            ]
        }
        for article in range(40)
    ]
}
HOTPOT = [
    {"question": f"Who wrote {n}?", "answer": f"Author{n}", "context": [[f"Book{n}", ["A. ", f"By Author{n}."]]]}
    for n in range(80)
]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_among_the_paragraphs_of_others(name: str, tmp_path: Path) -> None:
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(HOTPOT))
    found = task(name, 300, data_dir=tmp_path)
    for sample in found.samples():
        assert sample.prompt.count("Document ") > 10 and len(COUNT(sample.prompt)["input_ids"]) <= 300 - 32
        assert f"{sample.answers[0]}." in sample.prompt and sample.prompt.endswith("? Answer:")
        assert found.score(f"I think {sample.answers[-1]}", sample) == 1  # any answer will do
    assert "Impossible?" not in sample.prompt
    with pytest.raises(AHNError, match="not enough"):
        list(task(name, 100_000, data_dir=tmp_path).samples())


def test_questions_need_their_data(tmp_path: Path) -> None:
    with pytest.raises(AHNError, match=r"dev-v2\.0\.json.*--data-dir"):
        samples("qa_1")
    with pytest.raises(AHNError, match=r"dev-v2\.0\.json"):
        samples("qa_1", data_dir=tmp_path)
    (tmp_path / "dev-v2.0.json").write_text('{"data": [{}]}')
    with pytest.raises(AHNError, match=r"dev-v2\.0\.json.*paragraphs"):
        samples("qa_1", data_dir=tmp_path)

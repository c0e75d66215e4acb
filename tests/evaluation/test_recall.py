"""Tasks of `recall`: an oracle that reads the text has full marks, who has not read it no more than chance."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from word_tokenizer import WordTokenizer

from ahn.errors import AHNError
from ahn.evaluation.task import Sample
from ahn.evaluation.tasks import check, recall, tasks

COUNT = WordTokenizer()
CHANCE = {"rounds": 0.0, "counts": 0.35, "story_1": 0.35, "story_2": 0.35, "changes": 0.0}
"""Of the most frequent answer, of a hundred samples: one of six choices, or counts that are near."""


def task(
    name: str, length: int = 800, samples: int = 3, template: bool = False, **options: object
) -> recall.RecallTask:
    found = tasks(f"recall/{name}", tokenizer=WordTokenizer(template), lengths=(length,), samples=samples, **options)
    assert isinstance(found[0], recall.RecallTask) and len(found) == 1
    return found[0]


def oracle(name: str, prompt: str) -> str:
    """The answer, as somebody finds it who reads all of the prompt."""
    if name == "rounds":
        (ordinal,) = re.findall(r"answer to the (\w+) request", prompt)
        answers = said(name, prompt)
        assert len(answers) == recall.SAME
        return answers[recall.ORDINALS.index(ordinal)]
    if name == "counts":
        counts = Counter(re.findall(r"^Day \d+: in \S+ it was (\w+)\.$", prompt, re.MULTILINE))
        if asked := re.findall(r"On how many days was it (\w+)\?", prompt):
            return str(counts[asked[0]])
        ranked = sorted(recall.LABELS, key=lambda label: counts[label])
        return ranked[-1 if "the most frequent" in prompt else 0]
    if name == "changes":
        key = re.findall(r"What is the number of the (\w+)\?", prompt)[0]
        return str(re.findall(rf"The number of the {key} is (?:now )?(\d+)\.", prompt)[-1])
    (who,) = re.findall(r"Where is (?:the )?(\w+)\?", prompt)
    moves = re.findall(r"(\w+) (?:went to|took) the (\w+)\.", prompt)
    if name == "story_2":
        (taken,) = [n for n, (_, what) in enumerate(moves) if what == who]
        who, moves = moves[taken][0], moves[taken + 1 :]
    return str([place for one, place in moves if one == who][-1])


@pytest.mark.parametrize("name", recall.TASKS)
def test_who_reads_it_all_has_full_marks(name: str) -> None:
    for found in (task(name), task(name, 2500)):
        for sample in found.samples():
            assert found.score(f" {oracle(name, sample.prompt)}. Nothing else.", sample) == 1
            assert found.score("", sample) == found.score("I do not know.", sample) == 0


def said(name: str, prompt: str) -> list[str]:
    """All numbers, or what was answered to the request that is asked about: a quarter of it is right."""
    if name == "changes":
        return re.findall(r"(\d{6})", prompt)
    form, topic = re.findall(r"request for a (\w+) about the (\w+)\?", prompt)[0]
    return re.findall(rf"User: Write a {form} about the {topic}\.\nAssistant: (.*)\.", prompt)


@pytest.mark.parametrize("name", recall.TASKS)
def test_who_has_not_read_it_has_chance(name: str) -> None:
    """Always the most frequent answer of others; in a talk or of a number, any one that was said."""
    found = task(name, 500, samples=60)
    samples = list(found.samples())
    usual = Counter(sample.answers[0] for sample in samples[:30]).most_common(1)[0][0]
    assert sum(found.score(usual, sample) for sample in samples[30:]) / 30 <= CHANCE[name]
    rng = random.Random(0)
    if name in ("rounds", "changes"):
        drawn = [found.score(rng.choice(said(name, sample.prompt)), sample) for sample in samples]
        assert 0 < sum(drawn) / len(drawn) < 0.45


def test_a_wrong_choice_first_does_not_count_and_counts_may_be_near() -> None:
    story = next(task("story_1").samples())
    right = story.answers[0]
    wrong = next(place for place in recall.PLACES if place != right)
    assert [task("story_1").score(said, story) for said in (f"{right}, not {wrong}", f"{wrong} or {right}")] == [1, 0]
    count = Sample("0", "0", "", ("12",), {"choices": []})
    marks = [task("counts").score(said, count) for said in ("12 days", "11", "14 or 12", "about " + "9" * 5000)]
    assert marks == pytest.approx([1, 0.75, 0.5625, 0])


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", recall.TASKS)
@pytest.mark.parametrize("length", [700, 3000])
def test_prompts_fill_the_length_and_are_the_same_in_every_run(name: str, length: int) -> None:
    found = task(name, length)
    first = list(found.samples())
    assert first == list(task(name, length).samples()) and len({sample.prompt for sample in first}) == 3
    assert first != list(task(name, length, seed=1).samples())
    for sample in first:
        tokens = len(COUNT(sample.prompt)["input_ids"]) + found.max_new_tokens
        assert 0.9 * length < tokens <= length


def test_the_answer_begins_in_the_models_turn() -> None:
    (sample, *_) = task("changes", template=True).samples()
    message, _, prefix = sample.prompt.removeprefix("<user>").partition("<model>")
    assert message.endswith("?") and prefix.startswith(" The number of the ")


def test_names() -> None:
    assert [found.name for found in tasks("recall/2k", tokenizer=COUNT)] == [f"recall/{one}/2k" for one in recall.TASKS]
    assert len(tasks("recall", tokenizer=COUNT)) == len(recall.names()) == len(recall.TASKS) * len(recall.LEVELS)
    for spec in ("recall", "recall/changes", "recall/8k", "recall/rounds/3000"):
        check(spec)
    for wrong in ("recall/sum", "recall/rounds/4k/x"):
        with pytest.raises(AHNError):
            tasks(wrong, tokenizer=COUNT)

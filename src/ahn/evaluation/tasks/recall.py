"""Tasks beyond a needle, generated at any length: rounds of a talk, counts, facts in a story, facts that change.

Made after what others ask of long contexts, with sentences of our own, so that nothing is downloaded and nobody has
learned the answers: several-needle multi-round retrieval (MRCR), aggregation (OOLONG), bAbI's facts in a long text
(BABILong, arXiv 2406.10149). Lengths include the answer and are counted in the evaluated model's tokens.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from ahn.evaluation.task import Options, Sample
from ahn.evaluation.tasks import haystack, pick
from ahn.evaluation.tasks.generated import ANY_LENGTH, WORDS, GeneratedTask, Problem, lengths_of
from ahn.evaluation.tasks.haystack import Haystack
from ahn.tiny.facts import KEYS, VALUES

GENERATOR = 1
"""To be raised when a change here changes samples: results of different generators must not be compared."""
SAMPLES = 100
NEW_TOKENS = 24
LENGTH = ANY_LENGTH
LEVELS = ("2k", "4k", "8k", "16k", "32k", "64k")

SAME = 4
"""Rounds of a talk with the same request."""
FORMS = ("riddle", "poem", "toast", "slogan", "proverb", "headline")
ORDINALS = ("first", "second", "third", "fourth")
LABELS = ("sunny", "cloudy", "rainy", "foggy", "stormy", "snowy")
PEOPLE = ("Mary", "John", "Daniel", "Sandra", "Emily", "Peter")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
THINGS = ("football", "apple", "milk", "lantern", "basket", "violin")
FACTS = 12
"""Sentences of a story: enough that the last place named is seldom the answer."""
CHANGES = (2, 5)
"""How often a fact changes, at least and at most."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
NUMBER = re.compile(r"\d+")
CLOSE = 0.75
"""What a count that is wrong by one is worth, by two its square, and so on; as in OOLONG."""

Make = Callable[[random.Random, int, Haystack], Problem]


def _rounds(rng: random.Random, size: int, text: Haystack) -> Problem:
    """A talk of `SAME` equal requests and `size` others in pairs of rounds; asked is the n-th answer to the first."""
    topics = rng.sample(KEYS, 4)
    form = rng.choice(FORMS)
    others = [(one, topic) for one in FORMS for topic in topics if (one, topic) != (form, topics[0])]
    asked = [(form, topics[0])] * SAME + [rng.choice(others) for _ in range(size)]
    rng.shuffle(asked)
    said = [" ".join(rng.sample(VALUES, 4)) for _ in asked]
    talk = list(zip(asked, said, strict=True))
    lines = (f"User: Write a {one} about the {topic}.\nAssistant: {answer}." for (one, topic), answer in talk)
    mine = [answer for request, answer in talk if request == (form, topics[0])]
    which = rng.randrange(SAME)
    question = f"What did the assistant answer to the {ORDINALS[which]} request for a {form} about the {topics[0]}?"
    message = "Below is a talk of a user and an assistant.\n{}\n\n{} Give the answer word for word."
    return Problem(message.format("\n".join(lines), question), " The answer was:", (mine[which],))


def _counts(rng: random.Random, size: int, text: Haystack) -> Problem:
    """`size` days with their weather: how many days were so, or which weather was the most or the least frequent."""
    size = max(size, 8)
    while True:
        weights = [rng.uniform(1, 6) for _ in LABELS]
        days = rng.choices(LABELS, weights, k=size)
        counts = sorted(((days.count(label), label) for label in LABELS), reverse=True)
        if counts[0][0] > counts[1][0] and counts[-1][0] < counts[-2][0]:
            break
    places = rng.sample(WORDS, 8)
    lines = (f"Day {n}: in {rng.choice(places)} it was {label}." for n, label in enumerate(days, 1))
    kind = rng.choice(("most", "least", "count"))
    if kind == "count":
        count, label = rng.choice(counts)
        question, prefix, answer = f"On how many days was it {label}?", " The number of days is", str(count)
        choices: tuple[str, ...] = ()
    else:
        answer, choices = counts[0 if kind == "most" else -1][1], LABELS
        question, prefix = f"Which weather was the {kind} frequent: {', '.join(LABELS)}?", " The weather was"
    message = f"Below are notes on the weather.\n{chr(10).join(lines)}\n\nQuestion: {question}"
    return Problem(message, prefix, (answer,), choices)


def _one_fact(rng: random.Random, size: int, text: Haystack) -> Problem:
    """Where a person is: the last of their moves counts."""
    where: dict[str, str] = {}
    facts = []
    for _ in range(FACTS):
        who = rng.choice(PEOPLE)
        where[who] = rng.choice([place for place in PLACES if place != where.get(who)])
        facts.append(f"{who} went to the {where[who]}.")
    who = rng.choice(sorted(where))
    return _story(rng, size, text, facts, f"Where is {who}?", f" {who} is in the", where[who])


def _two_facts(rng: random.Random, size: int, text: Haystack) -> Problem:
    """Where a thing is: with whoever took it, where they went last."""
    thing, who = rng.choice(THINGS), rng.choice(PEOPLE)
    taken, where, facts = rng.randrange(FACTS - 2), "", []
    for n in range(FACTS):
        if n == taken:
            facts.append(f"{who} took the {thing}.")
        # The one who carries it moves at least once afterwards, and last of all somewhere.
        one = who if n == FACTS - 2 else rng.choice(PEOPLE)
        place = rng.choice([place for place in PLACES if place != where or one != who])
        where = place if one == who else where
        facts.append(f"{one} went to the {place}.")
    return _story(rng, size, text, facts, f"Where is the {thing}?", f" The {thing} is in the", where)


def _story(
    rng: random.Random, size: int, text: Haystack, facts: list[str], question: str, prefix: str, answer: str
) -> Problem:
    """Facts in their order between sentences of `size` words of a text, and what is asked."""
    message = (
        "Below is a text in which facts about some people are hidden. Only the latest fact about somebody counts.\n"
        f"{_between(rng, facts, text, size)}\n\nQuestion: {question} Answer with one word."
    )
    return Problem(message, prefix, (answer,), PLACES)


def _changes(rng: random.Random, size: int, text: Haystack) -> Problem:
    """Numbers that change; asked is the latest one of a key."""
    first, second = rng.sample(KEYS, 2)
    stated: list[tuple[str, str]] = [
        (key, str(rng.randint(100_000, 999_999))) for key in (first, second) for _ in range(1 + rng.randint(*CHANGES))
    ]
    rng.shuffle(stated)
    known: dict[str, str] = {}
    facts = []
    for key, value in stated:
        form = "The number of the {} is now {}." if key in known else "The number of the {} is {}."
        facts.append(form.format(key, value))
        known[key] = value
    message = (
        "Below is a text in which numbers are hidden. Some of them change: only the latest counts.\n"
        f"{_between(rng, facts, text, size)}\n\nQuestion: What is the number of the {first}?"
    )
    return Problem(message, f" The number of the {first} is", (known[first],))


def _between(rng: random.Random, facts: list[str], text: Haystack, size: int) -> str:
    """Facts in their order, at random places between sentences."""
    start = rng.randrange(len(text.words))
    sentences = SENTENCE_END.split(" ".join(haystack.cut(text.words, size, start))) if size else []
    places = [0, *sorted(rng.randint(0, len(sentences)) for _ in facts), len(sentences)]
    parts: list[str] = []
    for fact, (begin, end) in zip([*facts, ""], itertools.pairwise(places), strict=True):
        parts += [*sentences[begin:end], fact]
    return " ".join(part for part in parts if part)


TASKS: dict[str, tuple[Make, bool]] = {
    "rounds": (_rounds, False),
    "counts": (_counts, False),
    "story_1": (_one_fact, True),
    "story_2": (_two_facts, True),
    "changes": (_changes, True),
}
"""How each is made, and whether with a text."""


def names() -> list[str]:
    return [f"recall/{task}/{level}" for task in TASKS for level in LEVELS]


def tasks(parts: Sequence[str], options: Options) -> list[RecallTask]:
    """All, those of a task, those of a length ("recall/8k"), or one; lengths as for RULER."""
    rest, lengths = lengths_of(parts, options, LEVELS, "recall")
    chosen = pick(rest, tuple(TASKS), "recall")
    return [RecallTask(task, length, options, NEW_TOKENS) for task in chosen for length in lengths]


class RecallTask(GeneratedTask):
    """One of `TASKS` at one length."""

    benchmark, generator, default_samples = "recall", GENERATOR, SAMPLES

    @functools.cached_property
    def text(self) -> Haystack | None:
        return haystack.prose(self.options.haystack) if TASKS[self.task][1] else None

    def make(self, number: int, rng: random.Random, size: int) -> Problem:
        return TASKS[self.task][0](rng, size, self.text or Haystack("", ""))

    def extra(self, problem: Problem) -> dict[str, Any]:
        return {"choices": list(problem.choices)}

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the answer is said: in a talk word for word, of choices and numbers the first that is named."""
        answer, choices = sample.answers[0], sample.extra["choices"]
        if self.task == "rounds":
            return float(answer.lower() in prediction.lower())
        said = (re.compile(rf"\b({'|'.join(choices)})\b", re.IGNORECASE) if choices else NUMBER).search(prediction)
        if said is None:
            return 0.0
        if self.task == "counts" and not choices:
            return CLOSE ** abs(int(said[0][:9]) - int(answer))
        return float(said[0].lower() == answer.lower())

    @property
    def metric(self) -> str:
        return "recall.said"

"""RULER (arXiv 2404.06654): thirteen synthetic tasks at any length, generated here.

The construction, prompts and numbers of needles, hops and repetitions are those of the benchmark (NVIDIA/RULER,
scripts/data/synthetic and scripts/synthetic.yaml, Apache-2.0). Different are the random numbers, the words that needles
and lists are made of (pairs of nouns), and the essays: any local text, by default Python's language reference.
Lengths include the answer, as in the benchmark, and are counted in the evaluated model's tokens.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation.metrics import score
from ahn.evaluation.task import Options, Sample, Task
from ahn.evaluation.tasks import haystack, pick
from ahn.evaluation.tasks.generated import UNBOUNDED, Fit, Prompter
from ahn.evaluation.tasks.ruler import chains, needles, questions, words
from ahn.evaluation.tasks.ruler.problem import Problem

GENERATOR = 1
"""To be raised when a change here changes samples: results of different generators must not be compared."""
SAMPLES = 500
NEW_TOKENS = dict.fromkeys(needles.TASKS, 128) | {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(questions.FILES, 32)
TASKS = tuple(NEW_TOKENS)
LEVELS = ("4k", "8k", "16k", "32k", "64k", "128k")
"""The benchmark's lengths."""
LENGTH = re.compile(r"[1-9]\d*k?")
"""What can be asked for: any number of tokens."""

Make = Callable[[int, random.Random, int], Problem]
"""(number of the sample, its chance, size) -> problem"""


def names() -> list[str]:
    return [f"ruler/{task}/{level}" for task in TASKS for level in LEVELS]


def tasks(parts: Sequence[str], options: Options) -> list[Task]:
    """All, those of a task, those of a length ("ruler/32k"), or one.

    Lengths are those in the name, else those of the options, else the benchmark's. The two tasks of question answering
    are left out of "all" where there are no data for them.
    """
    rest = list(parts)
    levels = [rest.pop()] if rest and LENGTH.fullmatch(rest[-1]) else []
    if len(rest) > 1:
        raise AHNError(f"RULER has no length {rest[1]!r}; choose one of {', '.join(LEVELS)}, or a number of tokens.")
    lengths = [_tokens(level) for level in levels] or options.lengths or [_tokens(level) for level in LEVELS]
    known = tuple(task for task in TASKS if rest or options.data_dir or task not in questions.FILES)
    return [Ruler(task, length, options) for task in pick(rest, known, "RULER") for length in lengths]


def _tokens(level: str) -> int:
    return 1024 * int(level[:-1]) if level.endswith("k") else int(level)


def _level(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


class Ruler(Task):
    """One task at one length.

    Args:
        task: one of `TASKS`.
        length: tokens of prompt and answer together.
    """

    chat_template = False  # see `generated.Prompter`

    def __init__(self, task: str, length: int, options: Options) -> None:
        self.task, self.length, self.options = task, length, options
        self.name, self.profile = f"ruler/{task}/{_level(length)}", options.profile
        self.max_new_tokens = NEW_TOKENS[task]
        self._count = options.samples or SAMPLES
        self._prompter = Prompter(options, self.name)

    def samples(self) -> Iterator[Sample]:
        for number in range(self._count):
            problem = self._fit(number, functools.partial(self._problem, number))
            yield Sample(
                id=str(number),
                context=f"{number}",
                prompt=self._prompt(problem),
                answers=problem.answers,
                extra={"length": self.length},
            )

    def score(self, prediction: str, sample: Sample) -> float:
        return score(self._metric, prediction, sample.answers)

    def settings(self) -> dict[str, Any]:
        found = {
            "generator": GENERATOR,
            "length": self.length,
            "samples": self._count,
            "seed": self.options.seed,
            "metric": self._metric,
            "haystack": self._text.settings() if self._text else None,
        }
        if self.task in questions.FILES:
            found["data"] = questions.load(self.task, self.options.data_dir).sha256
        return found | self._prompter.settings()

    @property
    def _metric(self) -> str:
        return "ruler.part" if self.task in questions.FILES else "ruler.all"

    @functools.cached_property
    def _fit(self) -> Fit:
        most = words.MOST_UNCOMMON if self.task == "cwe" else UNBOUNDED
        if self.task in questions.FILES:
            most = len(questions.load(self.task, self.options.data_dir).paragraphs)
        return Fit(self.length - self.max_new_tokens, self._prompt, self._prompter.count, self.name, most)

    @functools.cached_property
    def _text(self) -> haystack.Haystack | None:
        needle = needles.TASKS.get(self.task)
        return haystack.prose(self.options.haystack) if needle and needle.needs_text else None

    @functools.cached_property
    def _make(self) -> Make:
        if self.task in needles.TASKS:
            return lambda number, rng, size: needles.TASKS[self.task].make(rng, size, self._text)
        if self.task in questions.FILES:
            return questions.load(self.task, self.options.data_dir).make
        makers = {"vt": chains.make, "cwe": words.common_words(self.length), "fwe": words.frequent_words(self.length)}
        return lambda number, rng, size: makers[self.task](rng, size)

    def _problem(self, number: int, size: int) -> Problem:
        # Seeded with a text: the same on every Python, and no two tasks or lengths share their chance.
        rng = random.Random(f"{GENERATOR} {self.options.seed} {self.task} {self.length} {number}")
        return self._make(number, rng, size)

    def _prompt(self, problem: Problem) -> str:
        return self._prompter.wrap(problem.message, problem.prefix)

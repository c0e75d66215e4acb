"""RULER (arXiv 2404.06654): thirteen synthetic tasks at any length, generated here.

The construction, prompts and numbers of needles, hops and repetitions are those of the benchmark (NVIDIA/RULER,
scripts/data/synthetic and scripts/synthetic.yaml, Apache-2.0). Different are the random numbers, the words that needles
and lists are made of (pairs of nouns), and the essays: any local text, by default Python's language reference.
Lengths include the answer, as in the benchmark, and are counted in the evaluated model's tokens.
"""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from ahn.evaluation.metrics import score
from ahn.evaluation.task import Options, Sample, Task
from ahn.evaluation.tasks import haystack, pick
from ahn.evaluation.tasks.generated import ANY_LENGTH, UNBOUNDED, GeneratedTask, Problem, lengths_of
from ahn.evaluation.tasks.ruler import chains, needles, questions, words

GENERATOR = 1
"""To be raised when a change here changes samples: results of different generators must not be compared."""
SAMPLES = 500
NEW_TOKENS = dict.fromkeys(needles.TASKS, 128) | {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(questions.FILES, 32)
TASKS = tuple(NEW_TOKENS)
LEVELS = ("4k", "8k", "16k", "32k", "64k", "128k")
"""The benchmark's lengths."""

LENGTH = ANY_LENGTH
Make = Callable[[int, random.Random, int], Problem]
"""(number of the sample, its chance, size) -> problem"""


def names() -> list[str]:
    return [f"ruler/{task}/{level}" for task in TASKS for level in LEVELS]


def tasks(parts: Sequence[str], options: Options) -> list[Task]:
    """All, those of a task, those of a length ("ruler/32k"), or one.

    Lengths are those in the name, else those of the options, else the benchmark's. The two tasks of question answering
    are left out of "all" where there are no data for them.
    """
    rest, lengths = lengths_of(parts, options, LEVELS, "RULER")
    known = tuple(task for task in TASKS if rest or options.data_dir or task not in questions.FILES)
    return [Ruler(task, length, options, NEW_TOKENS[task]) for task in pick(rest, known, "RULER") for length in lengths]


class Ruler(GeneratedTask):
    """One of `TASKS` at one length."""

    benchmark, generator, default_samples = "ruler", GENERATOR, SAMPLES

    def make(self, number: int, rng: random.Random, size: int) -> Problem:
        return self._make(number, rng, size)

    def score(self, prediction: str, sample: Sample) -> float:
        return score(self.metric, prediction, sample.answers)

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        if self.task in questions.FILES:
            found["data"] = questions.load(self.task, self.options.data_dir).sha256
        return found

    @property
    def metric(self) -> str:
        return "ruler.part" if self.task in questions.FILES else "ruler.all"

    @property
    def most(self) -> int:
        if self.task in questions.FILES:
            return len(questions.load(self.task, self.options.data_dir).paragraphs)
        return words.MOST_UNCOMMON if self.task == "cwe" else UNBOUNDED

    @functools.cached_property
    def text(self) -> haystack.Haystack | None:
        needle = needles.TASKS.get(self.task)
        return haystack.prose(self.options.haystack) if needle and needle.needs_text else None

    @functools.cached_property
    def _make(self) -> Make:
        if self.task in needles.TASKS:
            return lambda number, rng, size: needles.TASKS[self.task].make(rng, size, self.text)
        if self.task in questions.FILES:
            return questions.load(self.task, self.options.data_dir).make
        makers = {"vt": chains.make, "cwe": words.common_words(self.length), "fwe": words.frequent_words(self.length)}
        return lambda number, rng, size: makers[self.task](rng, size)

"""What generated tasks share: prompts of a given number of tokens, in the words of the evaluated model's tokenizer."""

import bisect
import dataclasses
import functools
import random
import re
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

from ahn.errors import AHNError
from ahn.evaluation.task import Options, Sample, Task
from ahn.evaluation.tasks.haystack import Haystack
from ahn.measure.parts import render
from ahn.measure.tokens import token_ids
from ahn.tiny.facts import KEYS, VALUES

Made = TypeVar("Made")

WORDS = tuple(f"{first}-{second}" for first in KEYS for second in VALUES)
"""16384 pairs of nouns, in place of the adjective-noun pairs that RULER takes from a package."""
UNBOUNDED = 1 << 40
CLOSE = 0.98
"""A prompt is long enough when it has this share of the tokens that it may have."""


ANY_LENGTH = re.compile(r"[1-9]\d*k?")
"""What can be asked for: any number of tokens."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A message to the model, how its answer begins, and what must occur in it.

    Attributes:
        choices: of which the first that is named is the answer, where there are such.
    """

    message: str
    prefix: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def lengths_of(
    parts: Sequence[str], options: Options, levels: Sequence[str], name: str
) -> tuple[list[str], Sequence[int]]:
    """The parts of a task's name without its length, and the lengths that are meant, in tokens.

    Those in the name, else those of the options, else the benchmark's.
    """
    rest = list(parts)
    named = [rest.pop()] if rest and ANY_LENGTH.fullmatch(rest[-1]) else []
    if len(rest) > 1:
        raise AHNError(f"{name} has no length {rest[1]!r}; choose one of {', '.join(levels)}, or a number of tokens.")
    return rest, [tokens_of(level) for level in named] or options.lengths or [tokens_of(level) for level in levels]


def tokens_of(level: str) -> int:
    """8k is 8192."""
    return 1024 * int(level[:-1]) if level.endswith("k") else int(level)


def _level(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


class Prompter:
    """Turns a message into a prompt, and counts its tokens.

    The answer's first words belong into the model's own turn, after the chat template, so prompts are templated here
    and not by the runner: a generated task has `chat_template = False`.
    """

    def __init__(self, options: Options, name: str) -> None:
        if options.tokenizer is None:
            raise AHNError(f"{name} makes prompts of a given number of tokens and needs the model's tokenizer for it.")
        self.tokenizer = options.tokenizer

    def wrap(self, message: str, prefix: str) -> str:
        """The message as a user's turn where the tokenizer has a template, then the beginning of the answer."""
        if not self.tokenizer.chat_template:
            return message + prefix
        turn = [{"role": "user", "content": message}]
        return render(self.tokenizer, turn, ask=True, enable_thinking=False) + prefix

    def count(self, prompt: str) -> int:
        """Tokens of a prompt."""
        return len(token_ids(self.tokenizer, prompt))

    def settings(self) -> dict[str, Any]:
        """How messages became prompts."""
        return {"prompts": "templated" if self.tokenizer.chat_template else "plain"}


class Fit:
    """Finds how much haystack fits into a prompt, and remembers it: counting tokens is what takes time.

    Args:
        prompt_of: the prompt of what a `make` function made.
        most: the largest size that can be made.
    """

    def __init__(
        self, limit: int, prompt_of: Callable[[Any], str], count: Callable[[str], int], name: str, most: int = UNBOUNDED
    ) -> None:
        self._limit, self._prompt_of, self._count, self._name, self._most = limit, prompt_of, count, name, most
        self._sizes: dict[Hashable, int] = {}

    def __call__(self, key: Hashable, make: Callable[[int], Made]) -> Made:
        """`make(size)` for the largest size that fits; later keys take one near that of the first.

        Args:
            key: of the sample; `make` must give the same for it every time.
            make: makes a sample with that many units of haystack, and more tokens the larger the size.
        """
        if key not in self._sizes:
            self._sizes[key] = self._adjust(make) if self._sizes else self._search(make)
        return make(self._sizes[key])

    def _tokens(self, make: Callable[[int], Made], size: int) -> int:
        return self._count(self._prompt_of(make(size)))

    def _search(self, make: Callable[[int], Made]) -> int:
        if (least := self._tokens(make, 0)) > self._limit:
            raise AHNError(
                f"{self._name}: without any haystack a prompt has {least} tokens, more than the {self._limit} that are "
                "left beside the answer. Give a greater --length."
            )
        above = min(16, self._most)
        while self._tokens(make, above) <= self._limit:
            if above == self._most:
                raise AHNError(f"{self._name}: there is not enough to fill so long a prompt. Give a smaller --length.")
            above = min(2 * above, self._most)
        return bisect.bisect_right(range(above), self._limit, key=lambda size: self._tokens(make, size)) - 1

    def _adjust(self, make: Callable[[int], Made]) -> int:
        """From the first sample's size, in a step or two: a search for each of 500 long prompts would take hours."""
        size = next(iter(self._sizes.values()))
        found = self._tokens(make, size)
        if found < CLOSE * self._limit:
            size = min(int(size * self._limit / found), self._most)
        while self._tokens(make, size) > self._limit:
            if size == 0:
                raise AHNError(f"{self._name}: no sample of this length can be made. Give a greater --length.")
            size -= max(1, size // 100)
        return size


class GeneratedTask(Task):
    """One task of a generated benchmark at one length.

    Args:
        length: tokens of prompt and answer together.
    """

    chat_template = False  # see `Prompter`
    benchmark: ClassVar[str]
    generator: ClassVar[int]
    """Results of different generators must not be compared."""
    default_samples: ClassVar[int]

    def __init__(self, task: str, length: int, options: Options, new_tokens: int) -> None:
        self.task, self.length, self.options = task, length, options
        self.name, self.profile = f"{self.benchmark}/{task}/{_level(length)}", options.profile
        self.max_new_tokens = new_tokens
        self._count = options.samples or self.default_samples
        self._prompter = Prompter(options, self.name)

    @property
    @abstractmethod
    def metric(self) -> str:
        """The name of how it scores."""

    @property
    def text(self) -> Haystack | None:
        """What it is made with."""
        return None

    @property
    def most(self) -> int:
        """The largest size that `make` knows."""
        return UNBOUNDED

    @abstractmethod
    def make(self, number: int, rng: random.Random, size: int) -> Problem:
        """The sample of that number, with so much haystack."""

    def extra(self, problem: Problem) -> dict[str, Any]:
        """What of a problem the score needs besides the answers."""
        return {}

    def samples(self) -> Iterator[Sample]:
        for number in range(self._count):
            problem = self._fit(number, functools.partial(self._problem, number))
            yield Sample(
                id=str(number),
                context=f"{number}",
                prompt=self._prompt(problem),
                answers=problem.answers,
                extra={"length": self.length} | self.extra(problem),
            )

    def settings(self) -> dict[str, Any]:
        found = {
            "generator": self.generator,
            "length": self.length,
            "samples": self._count,
            "seed": self.options.seed,
            "metric": self.metric,
            "haystack": self.text.settings() if self.text else None,
        }
        return found | self._prompter.settings()

    @functools.cached_property
    def _fit(self) -> Fit:
        limit = self.length - self.max_new_tokens
        return Fit(limit, self._prompt, self._prompter.count, self.name, self.most)

    def _problem(self, number: int, size: int) -> Problem:
        # Seeded with a text: the same on every Python, and no two tasks or lengths share their chance.
        rng = random.Random(f"{self.generator} {self.options.seed} {self.task} {self.length} {number}")
        return self.make(number, rng, size)

    def _prompt(self, problem: Problem) -> str:
        return self._prompter.wrap(problem.message, problem.prefix)

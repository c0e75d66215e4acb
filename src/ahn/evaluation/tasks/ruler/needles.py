"""RULER's needles in a haystack: keys with values, hidden in noise, in essays, or among more needles."""

import dataclasses
import itertools
import random
import re
import uuid
from typing import Literal

from ahn.evaluation.tasks import haystack
from ahn.evaluation.tasks.generated import WORDS, Problem
from ahn.evaluation.tasks.haystack import Haystack

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What things are hidden in where there is no text."""
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
)
ONE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"
SEVERAL = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind}s afterwards.\n{context}\nWhat are all the special magic {kind}s for {query} mentioned in the provided "
    "text?"
)
SEVERAL_PREFIX = " The special magic {kind}s for {query} mentioned in the provided text are"
DEPTHS = tuple(round(100 * n / 39) for n in range(40))
"""Where needles lie in essays, in percent."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Kind = Literal["word", "number", "uuid"]


@dataclasses.dataclass(frozen=True)
class Needles:
    """One of RULER's eight tasks with needles.

    Attributes:
        hay: sentences of noise, an essay's sentences, or needles with other keys.
        keys: needles with different keys, of which `queries` are asked for.
        values: needles per key.
    """

    hay: Literal["noise", "essay", "needles"]
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def needs_text(self) -> bool:
        """It is made with an essay."""
        return self.hay == "essay"

    def make(self, rng: random.Random, size: int, text: Haystack | None) -> Problem:
        """A problem with `size` sentences, or words of the essay."""
        keys = _different(self.key, self.keys, rng)
        values = {key: [_draw(self.value, rng) for _ in range(self.values)] for key in keys}
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.queries)
        answers = tuple(value for key in asked for value in values[key])
        context = self._essay(needles, text, rng, size) if text else self._lines(needles, keys, rng, size)
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        message, prefix = (ONE, ONE_PREFIX) if len(answers) == 1 else (SEVERAL, SEVERAL_PREFIX)
        return Problem(
            message.format(kind=self.value, context=context, query=query),
            prefix.format(kind=self.value, query=query),
            answers,
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def _lines(self, needles: list[str], keys: list[str], rng: random.Random, size: int) -> str:
        """Needles at random lines."""
        places = set(rng.sample(range(size + len(needles)), len(needles)))
        mine = iter(needles)
        lines = (next(mine) if n in places else self._hay(keys, rng) for n in range(size + len(needles)))
        return "\n".join(lines)

    def _hay(self, keys: list[str], rng: random.Random) -> str:
        if self.hay == "noise":
            return NOISE
        (key,) = _different(self.key, 1, rng, but=keys)
        return self._needle(key, _draw(self.value, rng))

    def _essay(self, needles: list[str], text: Haystack, rng: random.Random, size: int) -> str:
        """Needles between sentences, at depths that differ."""
        sentences = SENTENCE_END.split(" ".join(haystack.cut(text.words, size)))
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        places = [0, *(len(sentences) * depth // 100 for depth in depths), len(sentences)]
        parts: list[str] = []
        for needle, (start, stop) in zip([*needles, ""], itertools.pairwise(places), strict=True):
            parts += [*sentences[start:stop], needle]
        return " ".join(part for part in parts if part)


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuid"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


def _draw(kind: Kind, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(WORDS)


def _different(kind: Kind, count: int, rng: random.Random, but: list[str] | None = None) -> list[str]:
    """Keys that differ from each other and from `but`: an ambiguous question has no answer."""
    found: list[str] = []
    while len(found) < count:
        key = _draw(kind, rng)
        if key not in found and key not in (but or ()):
            found.append(key)
    return found

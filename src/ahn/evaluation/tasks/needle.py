"""Needles by depth and length: one short fact at each depth of a text, each asked for at its end.

"number": RULER's magic number between sentences, asked in its words. "fact": the fact format that ahn-tiny was trained
on (`ahn.tiny.facts`) between lines of code, answered by the next word. The needles of all depths lie in the same text,
so that it is read once and asked many times; each is asked for on its own.
"""

import bisect
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation.metrics import score, task_score
from ahn.evaluation.task import Options, Row, Sample, Task
from ahn.evaluation.tasks import haystack, pick
from ahn.evaluation.tasks.generated import WORDS, Fit, Prompter
from ahn.evaluation.tasks.ruler import needles
from ahn.tiny import facts

GENERATOR = 1
"""To be raised when a change here changes samples."""
KINDS = ("number", "fact")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
DEPTHS = tuple(10.0 * n for n in range(11))
SAMPLES = 5
"""Texts for each length."""
NEW_TOKENS = {"number": 32, "fact": 4}


def names() -> list[str]:
    return [f"needle/{kind}" for kind in KINDS]


def tasks(parts: Sequence[str], options: Options) -> list[Task]:
    """The kind that is named; "needle" alone is that with numbers."""
    return [Needle(pick(parts or KINDS[:1], KINDS, "needle")[0], options)]


@dataclasses.dataclass(frozen=True)
class NeedleText:
    """A text with needles, without question.

    Attributes:
        asked: (depth in percent, key, value) of each needle.
    """

    context: str
    asked: tuple[tuple[float, str, str], ...]


class Needle(Task):
    """A grid of lengths and depths with one kind of needle. A length is that of prompt and answer together."""

    chat_template = False  # see `generated.Prompter`

    def __init__(self, kind: str, options: Options) -> None:
        self.kind, self.name, self.profile = kind, f"needle/{kind}", options.profile
        self.max_new_tokens = NEW_TOKENS[kind]
        self.stops = ("\n",) if kind == "fact" else ()
        self.lengths, self.depths = options.lengths or LENGTHS, options.depths or DEPTHS
        self.texts, self.seed = options.samples or SAMPLES, options.seed
        self._path = options.haystack
        self._prompter = Prompter(options, self.name)
        self._fits = {length: self._fit(length) for length in self.lengths}
        if len(self.depths) > len(facts.KEYS):
            raise AHNError(f"needle has {len(facts.KEYS)} keys, so at most as many depths, not {len(self.depths)}.")

    def samples(self) -> Iterator[Sample]:
        for length, number in itertools.product(self.lengths, range(self.texts)):
            text = self._fits[length](number, functools.partial(self._text, length, number))
            for depth, key, value in text.asked:
                yield Sample(
                    id=f"{length}-{number}-{depth:g}",
                    context=f"{length}-{number}",
                    prompt=self._prompt(text, key),
                    answers=(value,),
                    extra={"length": length, "depth": depth},
                )

    def score(self, prediction: str, sample: Sample) -> float:
        if self.kind == "fact":
            return float(prediction.split()[:1] == list(sample.answers))
        return score("ruler.all", prediction, sample.answers)

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        cells: dict[tuple[int, float], list[float]] = {}
        for row in rows:
            cells.setdefault((row["extra"]["length"], row["extra"]["depth"]), []).append(row["score"])
        grid = [
            {"length": length, "depth": depth, "score": task_score(scores), "samples": len(scores)}
            for (length, depth), scores in cells.items()
        ]
        return super().summary(rows) | {"grid": grid}

    def settings(self) -> dict[str, Any]:
        numbers = {"lengths": list(self.lengths), "depths": list(self.depths), "samples": self.texts, "seed": self.seed}
        return {"generator": GENERATOR, "haystack": self._hay.settings()} | numbers | self._prompter.settings()

    @functools.cached_property
    def _hay(self) -> haystack.Haystack:
        return haystack.code(self._path) if self.kind == "fact" else haystack.prose(self._path)

    def _fit(self, length: int) -> Fit:
        room = length - self.max_new_tokens
        return Fit(room, self._longest_prompt, self._prompter.count, f"{self.name} at {length} tokens")

    def _longest_prompt(self, text: NeedleText) -> str:
        keys = (key for _, key, _ in text.asked)
        return self._prompt(text, max(keys, key=lambda key: self._prompter.count(f" {key}")))

    def _text(self, length: int, number: int, size: int) -> NeedleText:
        """A text with `size` words or lines of haystack, from a random place on."""
        rng = random.Random(f"{GENERATOR} {self.seed} {self.kind} {length} {number}")
        all_units = self._hay.lines if self.kind == "fact" else self._hay.words
        units = haystack.cut(all_units, size, rng.randrange(len(all_units)))
        if self.kind == "fact":
            pairs = [(key, rng.choice(facts.VALUES)) for key in rng.sample(facts.KEYS, len(self.depths))]
            lines = [facts.STATEMENT.format(key=key, value=value) for key, value in pairs]
            return NeedleText("".join(hide(lines, units, self.depths)), self._asked(pairs))
        keys = rng.sample(WORDS, len(self.depths))
        pairs = [(key, str(rng.randint(1_000_000, 9_999_999))) for key in keys]
        lines = [needles.NEEDLE.format(kind="number", key=key, value=value) for key, value in pairs]
        sentences = needles.SENTENCE_END.split(" ".join(units))
        return NeedleText(" ".join(hide(lines, sentences, self.depths)), self._asked(pairs))

    def _asked(self, pairs: Sequence[tuple[str, str]]) -> tuple[tuple[float, str, str], ...]:
        return tuple((depth, *pair) for depth, pair in zip(self.depths, pairs, strict=True))

    def _prompt(self, text: NeedleText, key: str) -> str:
        if self.kind == "fact":
            return text.context + facts.QUESTION.split(" {value}")[0].format(key=key)
        message = needles.ONE.format(kind="number", context=text.context, query=key)
        return self._prompter.wrap(message, needles.ONE_PREFIX.format(kind="number", query=key))


def hide(hidden: Sequence[str], units: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Units with something hidden between them: each after `depth` percent of the units' characters.

    Args:
        depths: 0 is before the first unit, 100 after the last.
    """
    ends = list(itertools.accumulate(map(len, units), initial=0))
    parts: list[str] = []
    done = 0
    for text, depth in sorted(zip(hidden, depths, strict=True), key=lambda pair: pair[1]):
        place = bisect.bisect_left(ends, ends[-1] * depth / 100)
        parts += [*units[done:place], text]
        done = max(done, place)
    return [*parts, *units[done:]]

"""Facts that a text states and later asks for, at known distances: a memory's exact recall, made measurable.

A statement is the line `# note: <key> <value>`, its question the line `# recall: <key> <value>`, both put between
lines of ordinary text. Keys and values are single tokens of ahn-tiny's tokenizer, so that one position answers: the
model reads `# recall: <key>` and has to predict the value, 1 of `len(VALUES)`.
"""

import dataclasses
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from ahn.errors import AHNError

KEYS = tuple(
    """
    amber apron arrow attic axle badge baker basin beach bench berry birch blade bloom board bonus booth brick bridge
    broom brush bucket cabin cable candle canyon castle cedar chair chalk cherry cliff clock cloud coast copper coral
    cotton couch cradle crane creek crown dairy delta desert diamond drum dune eagle ember engine fabric farm fence
    fern ferry flame flute forest fossil garden gate ginger glacier glass grain granite grove hammer harbor helmet
    hill honey island ivory jacket jungle kettle kitchen ladder lagoon lamp lantern lemon lily linen magnet maple
    marble market meadow melon mirror moss needle nest oak oasis olive onion orchard oven paddle palace panel pearl
    pebble pepper piano pillow pine planet plaza pond prairie puzzle quarry quilt reef ribbon river rocket saddle
    sand shelf spruce tunnel
    """.split()  # noqa: SIM905  (readable as prose)
)
"""What is asked for: 128 nouns that no value repeats."""

VALUES = tuple(
    """
    acorn anchor ankle apple badger banana barley basil beaver bison bottle bread butter button camel carrot cat chess
    cider clover cobra cocoa coffee comet cookie cow crab cricket crow daisy deer dog dolphin donkey dove duck elbow
    falcon feather finger fish flour fox frog ghost giant goat gold goose grape guitar hawk hazel heron hippo horse
    iron jaguar jasmine juice kiwi knight koala lamb lark lava leopard lion lizard llama lobster lotus mango mint
    monkey moon moose mouse mule nickel nurse ocean octopus opal orange orchid otter owl oyster panda panther parrot
    peach pear penguin pigeon pilot pirate plum poet poppy queen rabbit radish raven rice robin rose ruby sailor
    salmon seal shark sheep silver snake sparrow spider steel swan tea tiger toad tulip
    turtle walnut whale wolf
    """.split()  # noqa: SIM905
)
"""What is answered: 128 nouns."""

STATEMENT = "# note: {key} {value}\n"
QUESTION = "# recall: {key} {value}\n"


@dataclasses.dataclass(frozen=True)
class Fact:
    """One asked fact. `answer` is the position of the value in the question; the token before it predicts it.

    `distance` is the number of tokens from the value's statement to its answer: with an exact budget of T tokens the
    statement is out of sight of the predicting token when `distance > T` (sinks aside).
    """

    key: str
    value: str
    answer: int
    distance: int


@dataclasses.dataclass(frozen=True)
class FactText:
    """A text with facts: its token ids, the facts in order of their answers, and which positions were inserted."""

    ids: list[int]
    facts: list[Fact]
    inserted: list[int]


class FactWriter:
    """Writes facts into token sequences of one tokenizer.

    Args:
        tokenizer: a transformers tokenizer. Its tokens may end in a newline but have none inside.

    Raises:
        AHNError: fewer than two keys or values are single tokens, so nothing could be asked.
    """

    def __init__(self, tokenizer: Any) -> None:
        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        def slots(template: str) -> tuple[list[int], list[int], list[int]]:
            """The template's ids before the key, between key and value, and after the value."""
            start, rest = template.split(" {key}")
            middle, end = rest.split(" {value}")
            return encode(start), encode(middle), encode(end)

        self.keys = {word: ids[0] for word in KEYS if len(ids := encode(f" {word}")) == 1}
        self.values = {word: ids[0] for word in VALUES if len(ids := encode(f" {word}")) == 1}
        if min(len(self.keys), len(self.values)) < 2:
            raise AHNError("This tokenizer splits almost all words of ahn.tiny.facts; facts need one token per word.")
        self._statement, self._question = slots(STATEMENT), slots(QUESTION)
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._ends_line = [text.endswith("\n") for text in texts]
        self._blank = [text.isspace() and text.endswith("\n") for text in texts]

    @property
    def cost(self) -> int:
        """Tokens that one fact adds: its statement and its question."""
        return sum(len(part) for slots in (self._statement, self._question) for part in slots) + 4

    def line_starts(self, ids: Sequence[int]) -> list[int]:
        """Positions before which a line may be put, so that tokenizing the result as text gives the same tokens."""
        ends, blank = self._ends_line, self._blank
        return [i for i in range(1, len(ids)) if ends[ids[i - 1]] and not blank[ids[i]]]

    def write(
        self, ids: Sequence[int], count: int, rng: random.Random, min_distance: int = 1, max_distance: int | None = None
    ) -> FactText:
        """Put `count` facts into the text, each stated at least `min_distance` tokens before it is asked.

        Where a fact lies is drawn uniformly among the line starts that allow its distance; distances are drawn
        uniformly between the bounds, counted in the tokens of the bare text (inserted lines add to them).

        Args:
            ids: the bare text, N tokens. The result has `N + count · cost` tokens.
            count: at most the number of keys.
            rng: the only source of chance.
            min_distance, max_distance: bounds in tokens (None: the length of the text).

        Raises:
            AHNError: more facts than keys, or no two line starts are as far apart as asked.
        """
        if count > len(self.keys):
            raise AHNError(f"There are {len(self.keys)} keys, so at most as many facts in one text, not {count}.")
        spans = self._spans(ids, count, rng, min_distance, max_distance) if count else []
        keys = rng.sample(list(self.keys), count)
        values = [rng.choice(list(self.values)) for _ in keys]
        # A statement and a question at the same line start keep this order: statements come first.
        events = sorted(
            [(start, 0, n) for n, (start, _) in enumerate(spans)] + [(end, 1, n) for n, (_, end) in enumerate(spans)]
        )
        out: list[int] = []
        inserted: list[int] = []
        stated: dict[int, int] = {}
        facts: list[Fact] = []
        done = 0
        for place, is_question, n in events:
            out += ids[done:place]
            done = place
            first = len(out)
            before, between, after = self._question if is_question else self._statement
            out += [*before, self.keys[keys[n]], *between]
            if is_question:
                facts.append(Fact(keys[n], values[n], len(out), len(out) - stated[n]))
            else:
                stated[n] = len(out)
            out += [self.values[values[n]], *after]
            inserted += range(first, len(out))
        out += ids[done:]
        return FactText(out, facts, inserted)

    def _spans(
        self, ids: Sequence[int], count: int, rng: random.Random, low: int, high: int | None
    ) -> list[tuple[int, int]]:
        """`count` pairs of line starts, the second `low` to about `high` tokens after the first."""
        starts = self.line_starts(ids)
        longest = starts[-1] - starts[0] if starts else 0
        high = longest if high is None else min(high, longest)
        if not starts or high < low:
            raise AHNError(
                f"The text ({len(ids)} tokens) has no two lines {low} tokens apart to state and ask a fact at; "
                "give a longer one."
            )
        spans = []
        for _ in range(count):
            distance = rng.randint(low, high)
            end = starts[-1] - rng.randint(0, longest - distance)
            second = starts[bisect_left(starts, end)]
            first = starts[bisect_right(starts, min(second - low, end - distance)) - 1]
            spans.append((first, second))
        return spans

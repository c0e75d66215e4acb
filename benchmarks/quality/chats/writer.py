"""Pieces of long texts with facts in them, as chats of a chosen length in tokens."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ahn.errors import AHNError
from ahn.measure.texts import Text
from chats.items import KINDS, Item, fresh_names, quote
from chats.words import HELD_OUT, WORDS, Split

SENTENCE_END = re.compile(r"(?<=[.!?”\"])\s+(?=[A-Z“\"])|\n+")
SHORTEST = 64
"""Nearest that a fact is asked, in tokens of the text after it, unless told otherwise."""
ELSEWHERE = 1_000_000_007
"""Added to a seed to draw anew."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a chat is like.

    Attributes:
        length: tokens of the whole chat, at most; nearly as many are used.
        kinds: drawn from, with equal chances: `KINDS` and "quote".
        most: items in one chat; their number is drawn between 1 and this, small ones more often.
        near, far: bounds of the distance, in tokens of the text between what is asked and the text's end; drawn
            uniformly in its logarithm. None: as far as the text goes.
    """

    length: int
    kinds: tuple[str, ...] = (*KINDS, "quote")
    most: int = 8
    near: int = SHORTEST
    far: int | None = None

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in (*KINDS, "quote")]
        if unknown or not self.kinds:
            raise AHNError(f"Unknown kinds {', '.join(unknown) or '(none)'}; choose from {', '.join(KINDS)}, quote.")
        if self.most < 1 or not 0 <= self.near < (self.far or self.length):
            raise AHNError("A chat has at least one item, and near is less than far or the length.")


def texts_of(split: Split, texts: list[Text]) -> list[Text]:
    """The texts of a split, by a hash of their names: one in `HELD_OUT` is the evaluation's.

    Raises:
        AHNError: there are none; a single text belongs to one split only.
    """

    def held_out(text: Text) -> bool:
        return hashlib.sha256(text.name.encode()).digest()[0] % HELD_OUT == 0

    found = [text for text in texts if held_out(text) == (split == "evaluation")]
    if not found:
        raise AHNError(f"None of the {len(texts)} texts belongs to the split {split}: give more.")
    return found


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of the text.

    Attributes:
        starts: where each token begins, in characters of the whole text, and where the last one ends.
        ends: the ends of sentences in it.
    """

    starts: np.ndarray
    ends: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.starts) - 1

    def place(self, distance: int) -> int:
        """Where a sentence ends so many tokens before the end, or the next one before it."""
        wanted = self.starts[max(0, self.tokens - distance)]
        return int(self.ends[max(0, np.searchsorted(self.ends, wanted, side="right") - 1)])

    def distance(self, place: int) -> int:
        """The inverse of `place`."""
        return self.tokens - int(np.searchsorted(self.starts, place))


class ChatWriter:
    """Writes chats over the texts of one split. The same seed writes the same chats; threads may write at once.

    Args:
        tokenizer: a fast one with a chat template, which lengths and distances are measured with.
        texts: read one after the other; what no chat needs is not tokenised.
        split: says which words and phrasings are used.
    """

    def __init__(self, tokenizer: Any, texts: list[Text], split: Split) -> None:
        self.tokenizer, self.words = tokenizer, WORDS[split]
        # Of a copy that nobody sets up to cut or pad: calls of the tokenizer itself do, and no two may at once.
        self._fast = copy.deepcopy(tokenizer.backend_tokenizer)
        self._fast.no_truncation()
        self._fast.no_padding()
        self.text = "\n\n".join(text.text.strip() for text in texts_of(split, texts))
        self._ends = np.array([0, *(match.end() for match in SENTENCE_END.finditer(self.text))], np.int64)

    def _encoded(self, text: str) -> Any:
        return self._fast.encode(text, add_special_tokens=False)

    def write(self, plan: Plan, seed: int) -> dict[str, Any]:
        """A chat: `messages`, and `asked`, a list of kind, question, answer and distance in the order of the questions.

        Raises:
            AHNError: the texts are shorter than the chat, or the chat than what it should hold.
        """
        size, drawn = plan.length, seed
        for _ in range(16):
            chat = self._write(plan, size, random.Random(drawn))
            if not chat["asked"]:  # only quotations were drawn, and this piece has no sentence for one: another piece
                drawn += ELSEWHERE
                continue
            shown = self.tokenizer.apply_chat_template(chat["messages"], tokenize=False)
            over = len(self._encoded(shown).ids) - plan.length
            if over <= 0:
                return chat
            size -= over + 8
        if not chat["asked"]:
            raise AHNError("The texts have no sentence that is long enough to quote: choose more kinds.")
        raise AHNError(f"A chat of {plan.length} tokens does not hold up to {plan.most} items: make it longer.")

    def _write(self, plan: Plan, size: int, rng: random.Random) -> dict[str, Any]:
        before = rng.choice(self.words.before)
        kinds = rng.choices(plan.kinds, k=min(rng.randint(1, plan.most), rng.randint(1, plan.most)))
        names = fresh_names(self.words, rng)
        items = [KINDS[kind](self.words, names, rng) for kind in kinds if kind != "quote"]
        spoken = [part for item in items for part in (*item.statements, item.question, item.reply)]
        size -= sum(len(self._encoded(part).ids) + 8 for part in (before, *spoken))
        piece = self._piece(plan, size, rng)
        distances = [self._distance(plan, size, rng) for _ in range(kinds.count("quote"))]
        asked = [found for distance in distances for found in self._quotes(piece, piece.place(distance), rng)]
        insertions: list[tuple[int, str]] = []
        for item in items:
            nearest = self._distance(plan, size, rng)
            earlier = [rng.randint(nearest, size) for _ in item.statements[1:]]
            places = [piece.place(distance) for distance in (*sorted(earlier, reverse=True), nearest)]
            insertions += zip(places, item.statements, strict=True)
            asked.append((item, places[-1]))
        rng.shuffle(asked)
        text = self._insert(piece, insertions)
        return {
            "messages": self._messages(before, text, [item for item, _ in asked]),
            "asked": [self._record(item, piece.distance(where)) for item, where in asked],
        }

    def _piece(self, plan: Plan, size: int, rng: random.Random) -> Stretch:
        """So many tokens of the text, from the end of a sentence on."""
        if size <= plan.near:
            raise AHNError(f"A chat of {plan.length} tokens does not hold up to {plan.most} items: make it longer.")
        begins = len(self._ends)
        while begins:
            drawn = rng.randrange(begins)
            first = int(self._ends[drawn])
            starts = self._starts(first, size)
            if len(starts) > size:
                inside = slice(drawn, int(np.searchsorted(self._ends, starts[size], side="right")))
                return Stretch(starts[: size + 1], self._ends[inside])
            begins = drawn  # from here on the text is too short
        raise AHNError(f"The texts have {len(self.text)} characters, fewer than a chat of {plan.length} tokens.")

    def _starts(self, first: int, size: int) -> np.ndarray:
        """Where tokens begin from a character on, and where the last ends: more than `size` if there are as many."""
        for letters in (6, 12, 24, 10**9):  # per token
            part = self.text[first : first + letters * size]
            offsets = self._encoded(part).offsets
            if len(offsets) > size or first + len(part) == len(self.text):
                return np.array([start for start, _ in offsets] + [len(part)], np.int64) + first
        raise AssertionError("the whole rest was read")

    def _distance(self, plan: Plan, size: int, rng: random.Random) -> int:
        far = min(size, plan.far or size)
        return round(math.exp(rng.uniform(math.log(max(1, plan.near)), math.log(max(2, far)))))

    def _quotes(self, piece: Stretch, place: int, rng: random.Random) -> Iterator[tuple[Item, int]]:
        """The nearest sentence at a place or before it that can be quoted and stands once in the piece, if there is."""
        shown = self.text[piece.starts[0] : piece.starts[-1]]
        for at in range(min(int(np.searchsorted(piece.ends, place)), len(piece.ends) - 2), -1, -1):
            begin, end = int(piece.ends[at]), int(piece.ends[at + 1])
            sentence = self.text[begin:end].strip()
            item = quote(self.words, sentence, rng)
            if item is not None and shown.count(sentence) == 1:
                yield item, begin
                return

    def _insert(self, piece: Stretch, insertions: list[tuple[int, str]]) -> str:
        parts, done = [], int(piece.starts[0])
        for place, statement in sorted(insertions, key=lambda insertion: insertion[0]):
            parts += [self.text[done:place], statement, " "]
            done = place
        return "".join([*parts, self.text[done : int(piece.starts[-1])]]).strip()

    def _record(self, item: Item, distance: int) -> dict[str, Any]:
        return {"kind": item.kind, "question": item.question, "answer": item.answer, "distance": distance}

    def _messages(self, before: str, text: str, items: list[Item]) -> list[dict[str, str]]:
        messages = []
        for n, item in enumerate(items):
            question = item.question if n else f"{before}\n\n{text}\n\n{item.question}"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": item.reply})
        return messages

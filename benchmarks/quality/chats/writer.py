"""Pieces of long texts with facts in them, as chats of a chosen length in tokens."""

from __future__ import annotations

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


class ChatWriter:
    """Writes chats over the texts of one split. The same seed writes the same chats.

    Args:
        tokenizer: a fast one with a chat template, which lengths and distances are measured with.
        texts: read one after the other.
        split: says which words and phrasings are used.
    """

    def __init__(self, tokenizer: Any, texts: list[Text], split: Split) -> None:
        self.tokenizer, self.words = tokenizer, WORDS[split]
        self.text = "\n\n".join(text.text.strip() for text in texts_of(split, texts))
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self._starts = np.array([start for start, _ in encoded["offset_mapping"]] + [len(self.text)], np.int64)
        self._ends = np.array([0, *(match.end() for match in SENTENCE_END.finditer(self.text))], np.int64)

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
            over = len(self._ids(chat["messages"])) - plan.length
            if over <= 0:
                return chat
            size -= over + 8
        if not chat["asked"]:
            raise AHNError("The texts have no sentence that is long enough to quote: choose more kinds.")
        raise AHNError(f"A chat of {plan.length} tokens does not hold up to {plan.most} items: make it longer.")

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _write(self, plan: Plan, size: int, rng: random.Random) -> dict[str, Any]:
        before = rng.choice(self.words.before)
        kinds = rng.choices(plan.kinds, k=min(rng.randint(1, plan.most), rng.randint(1, plan.most)))
        names = fresh_names(self.words, rng)
        items = [KINDS[kind](self.words, names, rng) for kind in kinds if kind != "quote"]
        spoken = [part for item in items for part in (*item.statements, item.question, item.reply)]
        size -= sum(len(ids) + 8 for ids in self.tokenizer([before, *spoken], add_special_tokens=False)["input_ids"])
        first, last, place = self._piece(plan, size, rng)
        distances = [self._distance(plan, last - first, rng) for _ in range(kinds.count("quote"))]
        asked = [found for distance in distances for found in self._quotes(place(distance), first, last, rng)]
        insertions: list[tuple[int, str]] = []
        for item in items:
            nearest = self._distance(plan, last - first, rng)
            earlier = [rng.randint(nearest, last - first) for _ in item.statements[1:]]
            places = [place(distance) for distance in (*sorted(earlier, reverse=True), nearest)]
            insertions += zip(places, item.statements, strict=True)
            asked.append((item, places[-1]))
        rng.shuffle(asked)
        text = self._insert(first, last, insertions)
        return {
            "messages": self._messages(before, text, [item for item, _ in asked]),
            "asked": [self._record(item, where, last) for item, where in asked],
        }

    def _piece(self, plan: Plan, size: int, rng: random.Random) -> tuple[int, int, Any]:
        """First and last token of a piece of the text, and where in characters a sentence ends at a distance."""
        if size <= plan.near:
            raise AHNError(f"A chat of {plan.length} tokens does not hold up to {plan.most} items: make it longer.")
        begins = np.searchsorted(self._starts, self._ends)
        begins = begins[begins + size < len(self._starts)]
        if not len(begins):
            raise AHNError(f"The texts have {len(self._starts) - 1} tokens, fewer than a chat of {plan.length}.")
        first = int(begins[rng.randrange(len(begins))])
        last = first + size
        inside = self._ends[(self._ends >= self._starts[first]) & (self._ends <= self._starts[last])]

        def place(distance: int) -> int:
            wanted = self._starts[max(first, last - distance)]
            return int(inside[max(0, np.searchsorted(inside, wanted, side="right") - 1)])

        return first, last, place

    def _distance(self, plan: Plan, size: int, rng: random.Random) -> int:
        far = min(size, plan.far or size)
        return round(math.exp(rng.uniform(math.log(max(1, plan.near)), math.log(max(2, far)))))

    def _quotes(self, place: int, first: int, last: int, rng: random.Random) -> Iterator[tuple[Item, int]]:
        """The nearest sentence at a place or before it that can be quoted and stands nowhere else, if there is one."""
        at = int(np.searchsorted(self._ends, place))
        while at >= 0 and self._ends[at] >= self._starts[first]:
            begin, end = int(self._ends[at]), int(self._ends[min(at + 1, len(self._ends) - 1)])
            item = quote(self.words, self.text[begin:end].strip(), rng) if end <= self._starts[last] else None
            if item is not None and self.text.count(self.text[begin:end].strip()) == 1:
                yield item, begin
                return
            at -= 1

    def _insert(self, first: int, last: int, insertions: list[tuple[int, str]]) -> str:
        parts, done = [], int(self._starts[first])
        for place, statement in sorted(insertions, key=lambda insertion: insertion[0]):
            parts += [self.text[done:place], statement, " "]
            done = place
        return "".join([*parts, self.text[done : int(self._starts[last])]]).strip()

    def _record(self, item: Item, place: int, last: int) -> dict[str, Any]:
        distance = last - int(np.searchsorted(self._starts, place))
        return {"kind": item.kind, "question": item.question, "answer": item.answer, "distance": distance}

    def _messages(self, before: str, text: str, items: list[Item]) -> list[dict[str, str]]:
        messages = []
        for n, item in enumerate(items):
            question = item.question if n else f"{before}\n\n{text}\n\n{item.question}"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": item.reply})
        return messages

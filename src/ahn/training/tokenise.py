"""Conversations and texts to token ids, and which of them are to be learned."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.measure.tokens import around
from ahn.training.messages import FORM, WHERE, BadRowError, printable
from ahn.training.records import Conversation, Record, decode, normalise
from ahn.training.replies import Renderer

KEPT, SHORT, IDLE, BAD = "kept", "short", "idle", "bad"
"""What became of a row. Short: `shortest` tokens or fewer. Idle: long, but with nothing to learn late enough."""
VERSION = 3
"""Of what is made of a row: a cached result of another version is not used."""
EDGE = 64
"""Tokens that stay on either side of what is cut out of a conversation: turns begin and questions end there."""
NUMBER = re.compile(r":\d+$|\[\d+\]$")


@dataclasses.dataclass
class Piece:
    """One sample: token ids, whether each is to be learned, and whether something was cut out."""

    ids: np.ndarray
    learn: np.ndarray
    shortened: bool = False


@dataclasses.dataclass
class RowTokenizer:
    """Tokenises batches of raw rows for `datasets.map`; a row of the result is a sample, or says why there is none.

    Args:
        cutoff: longest sample in tokens. A conversation is shortened before its last reply, a text goes on in the next
            sample.
        shortest: samples of this many tokens or fewer are left out.
        smallest_total: no student sees fewer tokens exactly; a sample must have something to learn beyond them.
    """

    tokenizer: PreTrainedTokenizerBase
    cutoff: int
    shortest: int
    smallest_total: int
    strict: bool = False

    def key(self) -> str:
        """Everything that the result depends on."""
        return json.dumps([VERSION, self.cutoff, self.shortest, self.smallest_total, identity(self.tokenizer)])

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Samples by column, see `ahn.training.data.COLUMNS`."""
        found: list[dict[str, Any]] = []
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            where = str(row.get(WHERE, "a row"))
            file = where if row.get(FORM) == "text" else NUMBER.sub("", where)
            found += [sample | {"where": where, "file": file} for sample in self._samples(row, where)]
        names = ("input_ids", "learn", "fate", "problem", "where", "file", "first", "shortened", "unused")
        return {name: [sample[name] for sample in found] for name in names}

    def _samples(self, row: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
        nothing = Piece(np.zeros(0, np.int32), np.zeros(0, bool))
        try:
            record = normalise(decode(row))
            pieces, unused = self._pieces(record)
        except BadRowError as error:
            problem = printable(str(error))
            if self.strict:
                raise AHNError(f"{where}: {problem} (strict: the first bad row stops the run).") from None
            yield self._sample(nothing, BAD, problem, True, ())
            return
        for number, piece in enumerate(pieces):
            fate = self._fate(piece)
            yield self._sample(piece if fate == KEPT else nothing, fate, "", number == 0, () if number else unused)

    def _sample(self, piece: Piece, fate: str, problem: str, first: bool, unused: tuple[str, ...]) -> dict[str, Any]:
        sample = {"input_ids": piece.ids, "learn": piece.learn, "shortened": piece.shortened, "fate": fate}
        return sample | {"problem": problem, "first": first, "unused": [printable(name, 80) for name in unused]}

    def _pieces(self, record: Record) -> tuple[list[Piece], tuple[str, ...]]:
        if isinstance(record.content, str):
            return self._text(record.content), record.unused
        piece, unused = self._conversation(record.content)
        return [piece], (*record.unused, *unused)

    def _fate(self, piece: Piece) -> str:
        if len(piece.ids) <= self.shortest:
            return SHORT
        # The position before a token predicts it, and it must be at `smallest_total` or later.
        return KEPT if piece.learn[self.smallest_total + 1 :].any() else IDLE

    def _text(self, text: str) -> list[Piece]:
        before, after = self._around
        ids = [*self._encoded(text), *after]
        length = max(1, self.cutoff - len(before))
        # Each piece begins as texts did when the base was trained; only the last one ends as they did.
        pieces = [np.array([*before, *ids[n : n + length]], np.int32) for n in range(0, len(ids), length)]
        if len(pieces) > 1 and len(pieces[-1]) <= self.shortest:
            pieces.pop()  # the rest of a long text is not a sample that somebody wrote too short
        return [Piece(piece, np.ones(len(piece), bool)) for piece in pieces]

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        return around(self.tokenizer)

    @functools.cached_property
    def _render(self) -> Renderer:
        return Renderer(self.tokenizer)

    def _conversation(self, conversation: Conversation) -> tuple[Piece, tuple[str, ...]]:
        rendered = self._render(conversation)
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.int32)
        starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        learn = np.zeros(len(ids), bool)
        for first, last in rendered.spans:
            learn |= (starts < last) & (ends > first)
        kept = shorten(learn, self.cutoff)
        return Piece(ids[kept], learn[kept], len(kept) < len(ids)), rendered.unused


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer makes of text and of conversations."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def shorten(learn: np.ndarray, cutoff: int) -> np.ndarray:
    """Indices of the tokens of a conversation that stay where it is longer than `cutoff`.

    What follows the last reply goes first. If that is not enough, the longest stretches between the replies lose their
    middle, which leaves the beginnings of turns and the questions at their ends. If the replies alone are longer, the
    last ones go.
    """
    length = len(learn)
    if length <= cutoff or not learn.any():
        return np.arange(min(length, cutoff))
    end = max(int(np.flatnonzero(learn)[-1]) + 1, cutoff)
    excess, edge = end - cutoff, min(EDGE, cutoff // 8)
    keep = np.ones(end, bool)
    changes = np.flatnonzero(np.diff(np.concatenate([[True], learn[:end], [True]]).astype(np.int8)))
    stretches = [(int(last - first), int(first)) for first, last in changes.reshape(-1, 2)]
    for size, first in sorted(stretches, reverse=True):
        cut = min(excess, size - 2 * edge)
        if cut > 0:
            begin = first + (size - cut) // 2
            keep[begin : begin + cut] = False
            excess -= cut
    return np.flatnonzero(keep)[:cutoff]

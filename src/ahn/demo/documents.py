"""Texts for the demonstration: long real documents with facts put in, all of exactly the same length in tokens."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

from ahn.errors import AHNError
from ahn.measure.tokens import around, token_ids
from ahn.tiny.facts import Fact, FactText, FactWriter

FACTS = 32
"""Facts per document, at most; a quarter of a document's tokens is the other limit."""
SEED = 1


@dataclasses.dataclass(frozen=True)
class Document:
    """One text: `text.ids` is read, `text.inserted` are the positions of facts, which are not part of the real text."""

    name: str
    text: FactText

    def facts_beyond(self, window: int, sinks: int) -> list[Fact]:
        """Facts that no exact attention sees when they are asked for: stated after the sinks, before the window."""
        return [fact for fact in self.text.facts if fact.distance > window and fact.answer - fact.distance >= sinks]


def make_documents(
    tokenizer: Any, texts: Sequence[tuple[str, str]], count: int, length: int, lossless: int
) -> tuple[list[Document], str | None]:
    """Up to `count` documents of exactly `length` tokens, from different texts as far as there are enough.

    Args:
        texts: names and texts, taken from their beginnings; a text is cut into as many pieces as are needed.
        lossless: sinks + window. Facts are asked for at least this many tokens after they were stated.

    Returns:
        The documents, and why they hold no facts (None if they do).
    """
    if length < 2 * lossless:
        raise AHNError(
            f"{length} tokens are too few to go beyond {lossless} exact ones: give --length {2 * lossless} or more."
        )
    writer, reason = _fact_writer(tokenizer)
    facts = 0 if writer is None else min(FACTS, length // (4 * writer.cost), len(writer.keys))
    begin, _ = around(tokenizer)
    bare = length - len(begin) - (facts * writer.cost if writer is not None else 0)
    encoded: list[tuple[str, list[int]]] = []
    for name, text in texts:
        encoded.append((name, token_ids(tokenizer, text, special=False)))
        if sum(len(ids) >= bare for _, ids in encoded) == count:
            break  # a document of each is enough
    pieces = list(_pieces(encoded, bare, count)) or list(_pieces([_joined(encoded)], bare, count))
    if not pieces:
        tokens = sum(len(ids) for _, ids in encoded)
        raise AHNError(
            f"The text has {tokens} tokens, a document needs {bare}: give a longer text or a smaller --length."
        )
    documents = []
    for number, (name, ids) in enumerate(pieces):
        ids = [*begin, *ids]  # a piece begins as texts did when the base was trained
        with_facts = FactText(ids, [], [])
        if writer is not None:
            with_facts = writer.write(ids, facts, random.Random(f"{SEED}-{number}"), min_distance=lossless)
        documents.append(Document(name, with_facts))
    return documents, reason


def _fact_writer(tokenizer: Any) -> tuple[FactWriter | None, str | None]:
    try:
        return FactWriter(tokenizer), None
    except AHNError as error:
        return None, str(error)


def _pieces(encoded: Sequence[tuple[str, list[int]]], size: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """Pieces of `size` tokens: the first of every text, then the second of every text, …, `count` in all."""
    found = 0
    for start in range(0, max(len(ids) for _, ids in encoded), size):
        for name, ids in encoded:
            piece = ids[start : start + size]
            if len(piece) == size and found < count:
                found += 1
                yield (name if start == 0 else f"{name} from token {start}"), piece


def _joined(encoded: Sequence[tuple[str, list[int]]]) -> tuple[str, list[int]]:
    return " + ".join(name for name, _ in encoded), [token for _, ids in encoded for token in ids]

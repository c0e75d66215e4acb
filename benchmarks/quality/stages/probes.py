"""What models are measured on: held-out sequences, texts full of facts, and single facts at chosen depths.

A probe asks a model for hidden states of token ids, whichever way it reads them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ahn.tiny.facts import FactText, FactWriter

from .recipe import SEED, Context

Hidden = Callable[[Tensor], Tensor]
"""Token ids (B, L), on any device, to final hidden states (B, L, D)."""
Logits = Callable[[Tensor], Tensor]
"""Hidden states (n, D) to logits (n, V)."""

BUCKETS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Distances in tokens; a bucket reaches from one, exclusive, to the next, inclusive."""
FACTS = 48
"""In one text, at most; a quarter of its tokens is the other limit."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where a needle is stated, as a share of the text, which ends with the question. Sinks see the very beginning."""


def bucket(distance: int) -> int:
    """The lower end of a distance's bucket."""
    return max(low for low in BUCKETS if low < distance)


def repeat_distances(ids: np.ndarray) -> np.ndarray:
    """How many tokens ago each token of ids (L,) but the first followed the same token; 0 for never, (L - 1,)."""
    pairs = ids[:-1] * (int(ids.max()) + 1) + ids[1:]
    order = np.argsort(pairs, kind="stable")
    same = np.flatnonzero(pairs[order[1:]] == pairs[order[:-1]])
    distances = np.zeros(len(pairs), dtype=np.int64)
    distances[order[same + 1]] = order[same + 1] - order[same]
    return distances


@dataclasses.dataclass(frozen=True)
class Needle:
    """A text that ends with the question for a fact stated at `depth`, a share of its length."""

    text: FactText
    depth: float


class Probes:
    """Fixed probes of one context length, the same at every call and on every machine with the same corpus."""

    def __init__(self, folder: Path, facts: FactWriter, context: Context) -> None:
        self.context, self.facts = context, facts
        with np.load(folder / "held_out.npz") as held_out:
            self._documents = {name: held_out[name].astype(np.int64) for name in held_out.files}
        pieces = self._pieces(context.length)
        self.sources = [name for name, _ in pieces[: context.chunks]]
        self.chunks = torch.from_numpy(np.stack([ids for _, ids in pieces[: context.chunks]]))
        count = min(FACTS, context.length // (4 * facts.cost))
        bare = context.length - count * facts.cost
        self.texts = [
            facts.write(ids[:bare].tolist(), count, random.Random(f"{SEED}-{n}"))
            for n, (_, ids) in enumerate(pieces[: context.texts])
        ]
        self.repeats = np.stack([repeat_distances(ids) for ids in self.chunks.numpy()])
        self.needles = {length: self._needles(length) for length in context.needle_lengths}

    def _pieces(self, length: int) -> list[tuple[str, np.ndarray]]:
        """Whole pieces of documents, the first of each, then the second, …; of all of them joined if none is as long.

        A piece's name is its document's.
        """
        documents = self._documents
        if max(map(len, documents.values())) < length:
            documents = {"joined": np.concatenate(list(documents.values()))}
        starts = range(0, max(map(len, documents.values())), length)
        pieces = [(name, ids[start : start + length]) for start in starts for name, ids in documents.items()]
        whole = [(name, ids) for name, ids in pieces if len(ids) == length]
        if not whole:
            raise ValueError(f"All held-out text is shorter than {length} tokens; hold out more or measure less.")
        return whole

    def _needles(self, length: int) -> list[Needle]:
        """`trials` needles at each depth, each text `length` tokens long and the facts' own."""
        pieces, found = self._pieces(length), []
        for depth in DEPTHS:
            for trial in range(self.context.trials):
                rng = random.Random(f"needle-{SEED}-{length}-{depth}-{trial}")
                cut = int(depth * length)
                ids, starts = next(self._with_lines(rng.sample(pieces, len(pieces)), cut))
                text = self.facts.write(ids[cut:], 1, rng, min_distance=starts[-1] - starts[0])
                facts = [dataclasses.replace(fact, answer=fact.answer + cut) for fact in text.facts]
                whole = FactText(ids[:cut] + text.ids, facts, [position + cut for position in text.inserted])
                found.append(Needle(whole, depth))
        return found

    def _with_lines(self, pieces: list[tuple[str, np.ndarray]], cut: int) -> Iterator[tuple[list[int], list[int]]]:
        """Those with two lines or more after `cut`, and where those begin, counted from there."""
        for _, piece in pieces:
            starts = self.facts.line_starts(piece[cut:].tolist())
            if len(starts) > 1:
                yield piece.tolist(), starts


def read(hidden: Hidden, sequences: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[int, Tensor]]:
    """Read sequences, those of like lengths together: yields the number of each and its hidden states (L, D).

    `hidden` is asked for `rows` at once (fewer if there are fewer in all), on the CPU. What follows the end of a
    sequence cannot change it, so a batch is filled up with zeros: few shapes occur, and a GPU chooses or builds kernels
    for each.
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    rows = min(rows, len(order))
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        ids = torch.zeros(rows, len(sequences[part[-1]]), dtype=torch.long)
        for row, number in enumerate(part):
            ids[row, : len(sequences[number])] = torch.as_tensor(sequences[number])
        states = hidden(ids)
        yield from ((number, states[row, : len(sequences[number])]) for row, number in enumerate(part))


@torch.no_grad()
def recalled(states: Tensor, logits: Logits, text: FactText, values: dict[str, int]) -> list[bool]:
    """Whether each fact of a text was recalled, from its hidden states (L, D)."""
    guesses = logits(states[[fact.answer - 1 for fact in text.facts]]).argmax(-1).tolist()
    return [guess == values[fact.value] for guess, fact in zip(guesses, text.facts, strict=True)]


def by_distance(texts: list[FactText], right: list[bool]) -> dict[str, list[int]]:
    """Hits and asked facts of each bucket of distances, by the bucket's lower end."""
    counts: dict[int, list[int]] = {}
    facts = [fact for text in texts for fact in text.facts]
    for fact, hit in zip(facts, right, strict=True):
        entry = counts.setdefault(bucket(fact.distance), [0, 0])
        entry[0] += hit
        entry[1] += 1
    return {str(low): counts[low] for low in sorted(counts)}

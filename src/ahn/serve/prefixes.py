"""What prompts begin with, as digests: states are found by them, and so are the places where prompts part."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

BLOCK = 64
"""Prompts are seen to part at multiples of so many tokens."""


class Prefixes:
    """The beginnings of one owner's prompt.

    Attributes:
        ids: (L,) the prompt's token ids.
    """

    def __init__(self, owner: str, ids: Sequence[int]) -> None:
        self.ids = np.asarray(ids, dtype="<u4")
        self._seed = owner.encode() + b"\0"
        self._known: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def digests(self, lengths: Iterable[int]) -> dict[int, str]:
        """Of the beginnings of these lengths, as far as the prompt is as long."""
        wanted = sorted({length for length in lengths if 0 < length <= len(self.ids)})
        if any(length not in self._known for length in wanted):
            hasher, done = hashlib.blake2b(self._seed, digest_size=16), 0
            for length in wanted:
                hasher.update(self.ids[done:length].tobytes())
                self._known[length], done = hasher.copy().hexdigest(), length
        return {length: self._known[length] for length in wanted}

    def key(self, length: int) -> tuple[int, str]:
        """Under which a state that has read so many of the tokens is found."""
        return length, self.digests([length])[length]

    def blocks(self) -> dict[int, str]:
        """Digests of the beginnings of whole blocks."""
        return self.digests(range(BLOCK, len(self.ids) + 1, BLOCK))

    def shared(self, other: Prefixes) -> int:
        """Number of tokens that both begin with; none with another owner's."""
        if self._seed != other._seed:
            return 0
        n = min(len(self), len(other))
        differ = np.flatnonzero(self.ids[:n] != other.ids[:n])
        return int(differ[0]) if len(differ) else n


class SeenBlocks:
    """What prompts of late began with, in blocks; the oldest are forgotten.

    Args:
        limit: blocks to remember.
    """

    def __init__(self, limit: int = 1 << 18) -> None:
        self.limit = limit
        self._seen: OrderedDict[str, None] = OrderedDict()

    def add(self, prompt: Prefixes) -> int:
        """Remember a prompt; returns how many of its tokens, in whole blocks, an earlier one began with."""
        shared, alike = 0, True
        for length, digest in prompt.blocks().items():
            alike = alike and digest in self._seen
            shared = length if alike else shared
            self._seen[digest] = None
            self._seen.move_to_end(digest)
        while len(self._seen) > self.limit:
            self._seen.popitem(last=False)
        return shared

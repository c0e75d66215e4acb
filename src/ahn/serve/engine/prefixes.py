"""What prompts begin with, as digests: states are found by them, and so are the places where prompts part."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
"""Prompts are seen to part at multiples of so many tokens."""


class Prefixes:
    """The beginnings of one prompt."""

    def __init__(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        self.ids = np.asarray(ids, dtype="<u4")
        self._known: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def digests(self, lengths: Iterable[int]) -> dict[int, str]:
        """Of the beginnings of these lengths, as far as the prompt is as long."""
        wanted = sorted({length for length in lengths if 0 < length <= len(self.ids)})
        if any(length not in self._known for length in wanted):
            hasher, done = hashlib.blake2b(digest_size=16), 0
            for length in wanted:
                hasher.update(self.ids[done:length].tobytes())
                self._known[length], done = hasher.copy().hexdigest(), length
        return {length: self._known[length] for length in wanted}

    def key(self, length: int) -> tuple[int, str]:
        """Under which a state that has read so many of the tokens is found."""
        return length, self.digests([length])[length]

    def blocks(self) -> list[int]:
        """Of each beginning of whole blocks a number that says which it is, as good as for sure, in this process."""
        data, size, chain = self.ids.tobytes(), BLOCK * self.ids.itemsize, 0
        return [
            chain := hash((chain, data[end - size : end]))  # a digest of each would take several times as long
            for end in range(size, len(data) + 1, size)
        ]

    def shared(self, other: Prefixes) -> int:
        n = min(len(self), len(other))
        differ = np.flatnonzero(self.ids[:n] != other.ids[:n])
        return int(differ[0]) if len(differ) else n


class SeenBlocks:
    """What prompts of late began with, in blocks; the oldest are forgotten."""

    def __init__(self, limit: int = 1 << 18) -> None:
        self.limit = limit
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()

    def add(self, owner: str, prompt: Prefixes) -> int:
        """Remember a prompt; returns how many of its tokens, in whole blocks, began one of the same owner before."""
        blocks = [(owner, block) for block in prompt.blocks()]
        shared = next((n for n, block in enumerate(blocks) if block not in self._seen), len(blocks))
        for block in blocks[:shared]:
            self._seen.move_to_end(block)
        self._seen.update(dict.fromkeys(blocks[shared:]))
        while len(self._seen) > self.limit:
            self._seen.popitem(last=False)
        return shared * BLOCK

"""Which states are kept, and how each is found: by what it has read, and by the name of its conversation."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ahn.cache.conversation import AHNCache
from ahn.serve.engine.files import Note
from ahn.serve.engine.prefixes import Prefixes


@dataclasses.dataclass(eq=False)
class KeptState:
    """One state.

    Attributes:
        note: how it is found.
        cache: None where it is on disk alone.
        file: None where it is in memory alone.
        used: seconds since the epoch.
    """

    note: Note
    cache: AHNCache | None
    file: Path | None
    used: float

    @property
    def nbytes(self) -> int:
        return sum(self.note.parts.values())


class StateIndex:
    """States by their notes. Several may have read the same: conversations with names in which the same was said."""

    def __init__(self) -> None:
        self.named: dict[tuple[str, str], KeptState] = {}
        self._alike: dict[tuple[str, str], list[KeptState]] = {}
        self._lengths: dict[str, Counter[int]] = {}

    def __iter__(self) -> Iterator[KeptState]:
        return iter([state for alike in self._alike.values() for state in alike])

    def __contains__(self, state: KeptState) -> bool:
        return state in self._alike.get(state.note.key, ())

    def alike(self, owner: str, digest: str) -> list[KeptState]:
        return list(self._alike.get((owner, digest), ()))

    def like(self, note: Note) -> KeptState | None:
        """What holds the same already: one of the same conversation; where either has no name, any."""
        alike = self.alike(*note.key)
        same = [state for state in alike if state.note.name == note.name]
        return next((one for one in [*same, *alike] if one in same or None in (one.note.name, note.name)), None)

    def longest(self, owner: str, prompt: Prefixes, limit: int) -> KeptState | None:
        """What has read most of a prompt's beginning, at most `limit` tokens of it."""
        digests = prompt.digests(length for length in self._lengths.get(owner, ()) if length <= limit)
        found = (self._alike.get((owner, digests[length])) for length in sorted(digests, reverse=True))
        return next((alike[-1] for alike in found if alike), None)

    def add(self, state: KeptState) -> None:
        self._alike.setdefault(state.note.key, []).append(state)
        self._lengths.setdefault(state.note.owner, Counter())[state.note.length] += 1

    def remove(self, state: KeptState) -> None:
        if state not in self:
            return
        owner, name = state.note.owner, state.note.name
        self._alike[state.note.key].remove(state)
        if not self._alike[state.note.key]:
            del self._alike[state.note.key]
        self._lengths[owner] -= Counter([state.note.length])  # which leaves out what there is none of
        if not self._lengths[owner]:
            del self._lengths[owner]
        if name is not None and self.named.get((owner, name)) is state:
            del self.named[owner, name]

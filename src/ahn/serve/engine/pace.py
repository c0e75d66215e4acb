"""How much of prompts is read between two steps of the replies, so that those keep their pace."""

from __future__ import annotations

CHANGE = 0.2
"""Of a new time in the average."""


class Pace:
    """A chunk that takes about as long as a step: replies then go on at half their speed while others read.

    Chunks are halves of halves of the largest, few sizes. Where even the smallest takes longer than a step, there are
    as many steps before the next as take the same time.

    Args:
        largest: tokens of a chunk while nobody writes.
        smallest: tokens of a chunk that is worth its start.
    """

    def __init__(self, largest: int, smallest: int) -> None:
        self.largest, self.smallest = largest, min(largest, smallest)
        self.size = self.smallest
        self._step: float | None = None
        self._owed = 0.0
        """Seconds of steps before the next chunk."""

    def chunk(self, writing: bool) -> int:
        """Tokens of the next chunk; `writing`: whether replies wait for it."""
        return self.size if writing else self.largest

    def may_read(self, writing: bool) -> bool:
        """Whether it is time for a chunk."""
        return not writing or self._owed <= 0

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        self._owed = max(0.0, self._owed - 1.5 * seconds)
        self._step = seconds if self._step is None else self._step + CHANGE * (seconds - self._step)

    def read(self, tokens: int, seconds: float) -> None:
        """A chunk took so long while replies waited."""
        self._owed = seconds
        if self._step is None or tokens < self.size:  # the end of a prompt says little
            return
        if seconds > 1.5 * self._step:
            self.size = max(self.smallest, self.size // 2)
        elif seconds < 0.6 * self._step:
            self.size = min(self.largest, self.size * 2)

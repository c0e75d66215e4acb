"""Work on many files with all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
FEW = 2000
"""Items that are sooner done here than by processes which must start first."""


class Pool:
    """Maps functions over lists, in processes that start when there is enough to do and serve until `close`."""

    def __init__(self) -> None:
        self._pool: Any = None
        self.size = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def map(self, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Results in the order of the items. `function` must be importable, its module light."""
        if self._pool is None and (len(items) < FEW or self.size == 1):
            return [function(item) for item in items]
        if self._pool is None:
            # Spawned: a fork of a process whose libraries run threads may hang.
            self._pool = multiprocessing.get_context("spawn").Pool(min(self.size, 32))
        return self._pool.map(function, items, chunksize=max(1, min(64, len(items) // (4 * self.size))))

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.terminate()

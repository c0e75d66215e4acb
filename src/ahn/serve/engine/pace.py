"""How much of prompts is read between two steps of the replies, so that those keep their pace."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

CHANGE = 0.2
"""Of a new time in the average."""


class Pace:
    """Pieces that take about as long as a step: replies then go on at half their speed while others read.

    A piece is what is read between two steps: a chunk, or some layers of one (`pauses`). Chunks are halves of halves of
    the largest, few sizes. Where even a piece of the smallest takes longer than a step, there are as many steps before
    the next as take the same time.

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
        return not writing or self._owed <= 0

    @property
    def piece(self) -> float:
        """Seconds that a piece may take."""
        return math.inf if self._step is None else self._step

    def stepped(self, seconds: float) -> None:
        self._owed = max(0.0, self._owed - 1.5 * seconds)
        self._step = seconds if self._step is None else self._step + CHANGE * (seconds - self._step)

    def read(self, tokens: int, seconds: float, last: float | None = None) -> None:
        """A chunk was read while replies waited.

        Args:
            seconds: of a part of it in which no step could be taken.
            last: since the last step; None for all of it.
        """
        self._owed = seconds if last is None else last
        if self._step is None or tokens < self.size:  # the end of a prompt says little
            return
        if seconds > self._step:
            self.size = max(self.smallest, self.size // 2)
        elif seconds < 0.4 * self._step:
            self.size = min(self.largest, self.size * 2)


class LayerPauses:
    """Lets replies take a step between two layers of a chunk, as often as reading has taken as long as one.

    A forward can be entered while another is between its layers: all that ours adds to it is in its arguments.

    Args:
        layers: of the model.
        step: what replies do.
        device: of the model; where it works on by itself, each layer is waited for.

    Attributes:
        since: when the last step ended.
    """

    def __init__(
        self, layers: Iterable[nn.Module], pace: Pace, step: Callable[[], object], device: torch.device
    ) -> None:
        self._layers, self._pace, self._step, self._device = layers, pace, step, device
        self._thread, self._stepping = threading.get_ident(), False
        self._last = self.since = time.perf_counter()
        self._read, self._pieces = 0.0, 0

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside the block this thread's forwards pause."""
        handles = [layer.register_forward_pre_hook(self._before) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            finish(self._device)
            self._noted(time.perf_counter())

    @property
    def layer(self) -> float:
        """Seconds of a layer, on average: the longest one says more of what else ran than of the chunk."""
        return self._read / max(1, self._pieces)

    def _before(self, *_: Any) -> None:
        if self._stepping or threading.get_ident() != self._thread:
            return
        finish(self._device)
        now = time.perf_counter()
        layer = self._noted(now)
        if now - self.since + layer > self._pace.piece:
            self._stepping = True
            try:
                self._step()
            finally:
                self._stepping = False
            self.since = time.perf_counter()
        self._last = time.perf_counter()

    def _noted(self, now: float) -> float:
        took = now - self._last
        self._read, self._pieces = self._read + took, self._pieces + 1
        return took


def finish(device: torch.device) -> None:
    """Wait until a device has done what this thread gave it; copies beside that are not waited for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()

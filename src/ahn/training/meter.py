"""What a run's log says between two lines: means of the losses, the last window, speed and memory."""

import time
from typing import Any

import torch
from torch import Tensor

from ahn.measure.peak import so_far
from ahn.training.distillation import Distillation
from ahn.training.looks import Looks
from ahn.training.schedule import WindowDraw


class StepMeter:
    """Adds up on the device; only `read` waits for it."""

    def __init__(self) -> None:
        self._draw = WindowDraw(0, 0)
        self._clear()

    def _clear(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._steps = self._tokens = 0
        self._start = time.perf_counter()

    def start(self) -> None:
        """A step begins, with waiting for its data. What came since the last line (evaluation) is not timed."""
        if not self._steps:
            self._start = time.perf_counter()

    def note(self, draw: WindowDraw, tokens: int) -> None:
        """The step's window, and its real tokens over all ranks."""
        self._draw = draw
        self._steps += 1
        self._tokens += tokens

    def add(self, found: Distillation | Looks) -> None:
        """One micro-batch's share of a step."""
        self._names = found._fields[1:-1]  # without the loss, which the Trainer logs, and the number of positions
        parts = torch.stack(found[1:-1])
        self._sums = parts if self._sums is None else self._sums + parts

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means since the last call over steps and ranks; every rank must call. Nats per token, tokens/s, GiB."""
        if self._sums is None:
            return {}
        means = (accelerator.reduce(self._sums, "sum") / self._steps).tolist()
        elapsed = time.perf_counter() - self._start
        found = with_gap(dict(zip(self._names, means, strict=True)))
        found |= {"window": self._draw.window, "sinks": self._draw.sinks}
        found |= {"tokens_per_second": self._tokens / elapsed, "memory_gib": so_far() / 2**30}
        self._clear()
        return found


def with_gap(metrics: dict[str, float]) -> dict[str, float]:
    """With what the student's cross entropy loses against full attention, if they are among the metrics."""
    return metrics | ({"gap": metrics["ce"] - metrics["teacher_ce"]} if "ce" in metrics else {})

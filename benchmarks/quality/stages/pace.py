"""How far base training has come, and how many steps each phase still gets when time is short."""

from __future__ import annotations

import time
from collections.abc import Callable

from .recipe import Recipe

SETTLED = 10
"""Steps after a phase's first one (in which its shapes are compiled) by which its speed is known."""
RESERVE = 25.0
"""Seconds kept for measuring and saving."""


class Pace:
    """The planned steps of each phase: the recipe's, or as many as fit in a number of seconds.

    With a limit, each phase gets its share (by tokens) of the time that is left; what compiling took in the phase
    before is set aside for every later one. The learning rate follows `progress`, so that it always ends at zero.

    Args:
        recipe: its phases.
        seconds: from now until training has ended, None for no limit.
        clock: seconds that pass.
    """

    def __init__(self, recipe: Recipe, seconds: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.phases, self.total = recipe.phases, recipe.steps
        self.steps = [phase.steps for phase in recipe.phases]
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds - RESERVE
        self._begun = self._compiled = clock()

    @property
    def limited(self) -> bool:
        """Time is limited: `done` wants to be called when the device has finished."""
        return self._end is not None

    def begin(self) -> None:
        """A phase begins."""
        self._begun = self._clock()

    def done(self, phase: int, step: int) -> None:
        """A step of a phase has been done (0 is the first): after some, plan the rest."""
        now = self._clock()
        if step == 0:
            self._compiled = now
        if self._end is None or step != SETTLED:
            return
        later = len(self.phases) - phase - 1
        left = self._end - now - later * (self._compiled - self._begun)
        share = self.phases[phase].tokens / sum(each.tokens for each in self.phases[phase:])
        more = int(max(0.0, left * share) * SETTLED / (now - self._compiled))
        self.steps[phase] = min(self.phases[phase].steps, step + 1 + more)

    def progress(self, phase: int, step: int) -> float:
        """Share of all training before this step, 0 to 1."""
        before = sum(each.steps for each in self.phases[:phase])
        return (before + self.phases[phase].steps * step / self.steps[phase]) / self.total

"""Which window and sinks the student gets at each training step, and where it begins (docs/spec.md, section 6)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from ahn.errors import AHNError

TOTALS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SINKS = (0, 32, 64, 128, 512, 2048, 4096)
LINEAR_MINIMUM = 512


class WindowDraw(NamedTuple):
    """The student's `window` and `sinks` of one step, in tokens, and the `start`, the position of its first token."""

    window: int
    sinks: int
    start: int = 0

    @property
    def lossless(self) -> int:
        """Tokens the student sees exactly: window + sinks. Positions before it teach nothing."""
        return self.window + self.sinks


@dataclasses.dataclass(frozen=True)
class WindowSchedule:
    """Draws the lossless total T and the sinks S of a step, the window being T - S, and where sequences start.

    A draw depends on `(seed, step, length)` alone: every rank draws the same without talking, on every Python
    version, and a resumed run draws what the interrupted one would have drawn.

    Args:
        sliding_window_type: "random" draws T from `totals`; "fixed" uses `total`; "linear" uses max(length / 4, 512).
        ahn_position: "random" draws S from `sink_candidates`; "prefix" has no sinks.
        total: T of the type "fixed", in tokens.
        totals: candidates of T, in tokens; those with `lower_ratio · length < T < length` are allowed.
        sink_candidates: candidates of S, in tokens; those with S ≤ T / 2 are allowed.
        lower_ratio: the smallest share of a sequence that a drawn T may be, exclusive.
        positions: sequences start at any position from which one of the drawn length ends by this one; 0: always at 0.
            For memories that see positions (`Memory.sees_positions`): others learn the same anywhere.
        seed: of all draws.

    Raises:
        AHNError: an unknown type, a missing or superfluous `total`, or candidates out of range.
    """

    sliding_window_type: str = "random"
    ahn_position: str = "random"
    total: int | None = None
    totals: tuple[int, ...] = TOTALS
    sink_candidates: tuple[int, ...] = SINKS
    lower_ratio: float = 1 / 8
    positions: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("sliding_window_type", self.sliding_window_type, ("random", "fixed", "linear"))
        _one_of("ahn_position", self.ahn_position, ("random", "prefix"))
        if (self.total is not None) != (self.sliding_window_type == "fixed"):
            raise AHNError('WindowSchedule.total goes with sliding_window_type="fixed", and only with it.')
        if self.total is not None and self.total < 1:
            raise AHNError(f"WindowSchedule.total must be at least 1 token, got {self.total}.")
        if not 0 <= self.lower_ratio < 1:
            raise AHNError(f"WindowSchedule.lower_ratio must be at least 0 and below 1, got {self.lower_ratio}.")
        if self.positions < 0:
            raise AHNError(f"WindowSchedule.positions must be at least 0, got {self.positions}.")
        for name, minimum in (("totals", 1), ("sink_candidates", 0)):
            values = tuple(getattr(self, name))
            if not values or min(values) < minimum:
                raise AHNError(f"WindowSchedule.{name} must be integers ≥ {minimum}, at least one; got {values}.")
            object.__setattr__(self, name, values)

    def draw(self, step: int, length: int) -> WindowDraw:
        """Window, sinks and start of a step on sequences of `length` tokens.

        Raises:
            AHNError: no lossless total is shorter than the sequence, or no candidate is allowed for it.
        """
        total = self._total(step, length)
        start = self._pick("start", step, length, range(max(0, self.positions - length) + 1))
        if self.ahn_position == "prefix":
            return WindowDraw(total, 0, start)
        allowed = [sinks for sinks in self.sink_candidates if 2 * sinks <= total]
        if not allowed:
            raise AHNError(
                f"No sinks of {self.sink_candidates} are at most half of the lossless total {total}; "
                "add a smaller candidate to sink_candidates."
            )
        sinks = self._pick("sinks", step, length, allowed)
        return WindowDraw(total - sinks, sinks, start)

    def _total(self, step: int, length: int) -> int:
        if self.sliding_window_type == "random":
            allowed = [total for total in self.totals if self.lower_ratio * length < total < length]
            if not allowed:
                raise AHNError(
                    f"No lossless total of {self.totals} lies strictly between {self.lower_ratio * length:g} and "
                    f"{length} tokens; give other totals, or sequences of another length."
                )
            return self._pick("total", step, length, allowed)
        total = self.total if self.total is not None else max(length // 4, LINEAR_MINIMUM)
        if total >= length:
            raise AHNError(
                f"The lossless total {total} is not below the sequence length {length}, so nothing would leave the "
                "window; use longer sequences or a smaller total."
            )
        return total

    def _pick(self, what: str, step: int, length: int, candidates: Sequence[int]) -> int:
        # A hash, not `random`: the same everywhere and for ever. 64 bits make the bias of % negligible.
        digest = hashlib.sha256(f"{what}:{self.seed}:{step}:{length}".encode()).digest()
        return candidates[int.from_bytes(digest[:8], "big") % len(candidates)]


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise AHNError(f"WindowSchedule.{name} must be one of {', '.join(choices)}, got {value!r}.")

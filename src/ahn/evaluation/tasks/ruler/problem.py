"""What each of RULER's generators makes."""

from __future__ import annotations

import dataclasses

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclasses.dataclass(frozen=True)
class Problem:
    """A message to the model, how its answer begins, and what must occur in it."""

    message: str
    prefix: str
    answers: tuple[str, ...]

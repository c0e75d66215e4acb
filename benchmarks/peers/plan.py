"""What the systems share: contexts, where rows go, the directory that vLLM reads a shape from, and plain sums."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ahn.bench.shapes import configuration

SPARE = 1024
"""Positions beyond the longest context, for the tokens that are written."""
TOGETHER = 2
"""Of the contexts, the shorter ones for which many conversations are measured as well."""


@dataclasses.dataclass
class Rows:
    """Lines of JSON, on the screen and in a file the moment they are measured.

    Attributes:
        out: appended to; None for the screen alone.
        shared: columns that all rows have.
        until: `time.monotonic()` after which nothing long begins.
    """

    out: Path | None
    shared: dict[str, Any]
    until: float

    def write(self, **row: Any) -> None:
        """A row."""
        line = json.dumps(self.shared | row)
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                print(line, file=file, flush=True)

    def measure(self, work: Callable[[], dict[str, Any]], expected: float = 0.0, **what: Any) -> dict[str, Any] | None:
        """A row of what `work` finds, or of why there is nothing; then None.

        Args:
            work: the measurement.
            expected: seconds that it will take, for what is worth leaving out.
            what: columns that say what is measured.
        """
        start = time.monotonic()
        if start + expected > self.until:
            self.write(**what, status="skipped", why=f"takes about {expected:.0f} s, more than --limit leaves")
            return None
        try:
            found = work()
        except Exception as error:  # one row less; the next is measured all the same
            text = " ".join(str(error).split())[:500]
            self.write(**what, status="failed", why=f"{type(error).__name__}: {text}")
            return None
        self.write(**what, status="ok", **found, took_s=time.monotonic() - start)
        return found


def write_shape(folder: Path, name: str, longest: int) -> Path:
    """A model directory without weights and tokenizer: the configuration of a shape, for contexts up to `longest`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = configuration(name)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.max_position_embeddings = longest + SPARE
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return folder


def differences(long: Sequence[float], short: Sequence[float], steps: int, batch: int = 1) -> dict[str, Any]:
    """Seconds a step from pairs of calls that differ by so many steps."""
    times = [(a - b) / steps for a, b in zip(long, short, strict=True)]
    seconds = statistics.median(times)
    return {"seconds": seconds, "times_s": times, "tokens_per_second": batch / seconds}


def reading_seconds(context: int) -> float:
    """About what full attention needs to read a prompt on an H200 (6.9 s for 131 072 tokens), to leave out minutes."""
    return 4e-10 * context**2


def held(room: float, each: float, most: int) -> int:
    """Conversations of which each needs `each`, in `room`; never more than `most`."""
    return min(most, int(room // each))

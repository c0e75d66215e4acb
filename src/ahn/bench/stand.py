"""Everything that the rows of one run share: the model, the machine's ceilings, and how long to measure."""

import dataclasses
import statistics
from typing import Any

import torch
from transformers import PreTrainedModel

from ahn.bench.ceilings import Ceilings
from ahn.bench.roofline import Work
from ahn.measure.clock import bytes_of, spread
from ahn.measure.peak import Peak


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """How to measure.

    Attributes:
        new_tokens: steps in one repetition of a decode measurement.
        real_prefill: before decoding, really read the context rather than fill the caches with random numbers.
        repeats: repetitions of which the median counts.
        budget: seconds after which no further repetition of a row begins.
        max_seconds: a row whose limit alone is longer is skipped.
        profile: list the kernels of a prompt, a step or a training step in its row.
        activation_checkpointing: in training, compute activations again in the backward pass rather than keep them.
    """

    new_tokens: int = 64
    real_prefill: bool = False
    repeats: int = 5
    budget: float = 10.0
    max_seconds: float = 120.0
    profile: bool = False
    activation_checkpointing: bool = True


@dataclasses.dataclass(frozen=True)
class Stand:
    """A bare base model on a machine whose ceilings are known."""

    model: PreTrainedModel
    ceilings: Ceilings
    settings: BenchSettings

    @property
    def device(self) -> torch.device:
        return self.model.device

    def held(self) -> int:
        """Bytes of the weights."""
        return bytes_of(self.model.parameters()) + bytes_of(self.model.buffers())


def timed(stand: Stand, times: list[float], tokens: int, memory: Peak, work: Work) -> dict[str, Any]:
    """The columns of a row that was timed: so many tokens in each of these times, in seconds."""
    seconds = statistics.median(times)
    found = {"seconds": seconds, "spread": spread(times), "times_s": times, "tokens_per_second": tokens / seconds}
    found |= {"peak_bytes": memory.total, "reserved_bytes": memory.reserved}
    return found | work.report(stand.ceilings, seconds)


class Skipped(Exception):  # noqa: N818  (not an error: a row says so)
    """A row that would take too long."""


def check_patience(stand: Stand, limit: float, what: str) -> None:
    """Refuse work that takes too long even at the machine's ceilings."""
    if limit > stand.settings.max_seconds:
        raise Skipped(
            f"{what} takes at least {limit:.0f} s on this machine, --max-seconds allows {stand.settings.max_seconds:g}"
        )

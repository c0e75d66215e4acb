"""Where a process is among the others, and what it may say."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among `ranks`.

    Attributes:
        waiting: a group whose barrier keeps no GPU busy; None where there is nobody to wait for.
        speaks: whether it prints.
        until: when, on `time.monotonic`, no further repetition begins.
    """

    rank: int
    ranks: int
    device: torch.device
    waiting: Any
    speaks: bool
    until: float = float("inf")

    def alone(self) -> Place:
        """As if there were no others."""
        return dataclasses.replace(self, rank=0, ranks=1, waiting=None)

    def say(self, **facts: Any) -> None:
        """A line of JSON."""
        if self.speaks:
            print(json.dumps(facts), flush=True)

    def barrier(self) -> None:
        if self.waiting is not None:
            dist.barrier(self.waiting)

    def late(self) -> bool:
        """Whether the time is up, for any of the processes."""
        up = torch.tensor(float(time.monotonic() > self.until))
        if self.waiting is not None:
            dist.all_reduce(up, dist.ReduceOp.MAX, group=self.waiting)
        return bool(up)

    def of_all(self, value: float) -> list[float]:
        """What each process has found."""
        found: list[Any] = [value] * self.ranks
        if self.waiting is not None:
            dist.all_gather_object(found, value, group=self.waiting)
        return found

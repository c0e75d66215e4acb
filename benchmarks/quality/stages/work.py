"""What a process of the study does for its jobs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from transformers.utils import logging

from .base import train_base
from .distill import distill_memory
from .evaluate import Evaluation
from .recipe import Recipe, Task


@dataclasses.dataclass(frozen=True)
class Part:
    """A job: stages, in this order, of one task; the base model has none."""

    stages: tuple[str, ...]
    task: Task | None = None


class Work:
    """Does one part of a study after another on one device.

    Args:
        seconds: of the base's training, at most.
    """

    def __init__(self, recipe: Recipe, out: Path, seconds: float | None, device: str) -> None:
        logging.disable_progress_bar()
        self.recipe, self.out, self.seconds = recipe, out, seconds
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        """Kept from task to task."""
        return Evaluation(self.recipe, self.out, self.device)

    def __call__(self, part: Part) -> None:
        for stage in part.stages:
            if part.task is None:
                train_base(self.recipe, self.out, self.device, self.seconds)
            elif stage == "distill":
                distill_memory(self.recipe, self.out, part.task, self.device)
            else:
                self.evaluation.measure(part.task)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # others want it too

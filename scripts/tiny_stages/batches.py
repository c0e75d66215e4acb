"""Training batches: windows of the corpus with facts put in, a function of (seed, step) alone."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from ahn.tiny.facts import FactWriter

from .recipe import SEED, Phase, Recipe

KEPT = 300  # the most frequent tokens (keywords, marks, "self") keep their meaning when names are exchanged
RENAMED = 0.3
IGNORED = -100


class Renamer:
    """Exchanges a random 30 % of the rarer words of a text for other words, the same way throughout.

    Names then mean only what this text says about them, so that the model has to look back; and a corpus seen dozens of
    times cannot be learned by heart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train: np.ndarray, fixed: set[int]) -> None:
        counts = np.bincount(train, minlength=len(tokenizer))
        frequent = set(np.argsort(-counts)[:KEPT].tolist())
        kinds: dict[str, list[int]] = {}
        for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
            match = re.fullmatch(r"([^A-Za-z]?)([A-Z]*)([a-z]*)", text)
            if match and i not in frequent | fixed and len(text) > 2:
                mark, upper, lower = match.groups()
                kinds.setdefault(f"{mark}{'A' if upper else ''}{'a' if lower else ''}", []).append(i)
        self._kinds = [np.array(ids) for ids in kinds.values()]
        self._size = len(tokenizer)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        table = np.arange(self._size)
        for kind in self._kinds:
            chosen = rng.permutation(kind)[: int(RENAMED * len(kind))]
            table[chosen] = np.roll(chosen, 1)
        return table[ids]


class Batches(Dataset):
    """Step n's batch: ids (B, L + 1) int64 and the loss weight of each predicted token (B, L) float32.

    Inserted lines weigh nothing, since nothing before them foretells them, except for the answers.
    """

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe = recipe
        self.train = np.load(folder / "train.npy").astype(np.int64)
        self.facts = FactWriter(tokenizer)
        self.rename = Renamer(tokenizer, self.train, {*self.facts.keys.values(), *self.facts.values.values()})

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        phase = phase_at(self.recipe, step)
        rows = [self._row(phase.length, phase.facts, phase.reach, f"{SEED}-{step}-{row}") for row in range(phase.batch)]
        ids, weights = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return ids, weights

    def _row(self, length: int, facts: tuple[int, int], reach: int | None, seed: str) -> tuple[np.ndarray, np.ndarray]:
        rng = random.Random(seed)
        count = rng.randint(*facts)
        bare = length + 1 - count * self.facts.cost
        start = rng.randrange(len(self.train) - bare)
        window = self.train[start : start + bare]
        if rng.random() < self.recipe.rename_share:
            window = self.rename(window, np.random.default_rng(rng.getrandbits(64)))
        text = self.facts.write(window.tolist(), count, rng, max_distance=reach)
        weights = np.ones(length + 1, dtype=np.float32)
        weights[text.inserted] = 0
        weights[[fact.answer for fact in text.facts]] = self.recipe.answer_weight
        return np.array(text.ids), weights[1:]


class Answers(Dataset):
    """Step n's batch for distillation: `input_ids` and `labels` (B, L), inserted lines masked but for the answers."""

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings, self.rename_share = recipe.distillation, recipe.rename_share
        self.train = np.load(folder / "train.npy").astype(np.int64)
        self.facts = FactWriter(tokenizer)
        self.rename = Renamer(tokenizer, self.train, {*self.facts.keys.values(), *self.facts.values.values()})

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        settings = self.settings
        ids = np.zeros((settings.batch, settings.length), dtype=np.int64)
        labels = np.zeros_like(ids)
        for row in range(settings.batch):
            rng = random.Random(f"distill-{SEED}-{step}-{row}")
            count = rng.randint(*settings.facts)
            bare = settings.length - count * self.facts.cost
            start = rng.randrange(len(self.train) - bare)
            window = self.train[start : start + bare]
            if rng.random() < self.rename_share:
                window = self.rename(window, np.random.default_rng(rng.getrandbits(64)))
            text = self.facts.write(window.tolist(), count, rng)
            answers = [fact.answer for fact in text.facts]
            ids[row] = labels[row] = text.ids
            labels[row, text.inserted] = IGNORED
            labels[row, answers] = ids[row, answers]
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def phase_at(recipe: Recipe, step: int) -> Phase:
    """The phase that step belongs to."""
    for phase in recipe.phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    raise IndexError("step is beyond the last phase")


def workers() -> int:
    """Processes that make batches: none without a GPU, where they would compete with the model."""
    return min(12, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0


def loader(batches: Dataset, workers: int) -> DataLoader:
    """All batches in order, made ahead in `workers` processes."""
    return DataLoader(
        batches,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )

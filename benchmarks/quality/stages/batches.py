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

from ahn.tiny.facts import FactText, FactWriter

from .recipe import SEED, Distillation, Recipe

KEPT = 300  # the most frequent tokens (keywords, marks, "self") keep their meaning when names are exchanged
RENAMED = 0.3
SAMPLED = 10_000_000  # tokens that frequencies are counted on
IGNORED = -100


class Renamer:
    """Exchanges a random 30 % of the rarer words of a text for other words, the same way throughout.

    Names then mean only what this text says about them, so that the model has to look back; and a corpus seen dozens of
    times cannot be learned by heart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train: np.ndarray, fixed: set[int]) -> None:
        counts = np.bincount(train[:: 1 + len(train) // SAMPLED], minlength=len(tokenizer))
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


class Texts:
    """Windows of the training text, half of them renamed, with facts put in."""

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rename_share = recipe.rename_share
        self.train = np.load(folder / "train.npy", mmap_mode="r")
        self.facts = FactWriter(tokenizer)
        self.rename = Renamer(tokenizer, self.train, {*self.facts.keys.values(), *self.facts.values.values()})

    def draw(self, length: int, facts: tuple[int, int], seed: str, reach: int | None = None) -> FactText:
        """A text of exactly `length` tokens, a function of the seed."""
        rng = random.Random(seed)
        count = rng.randint(*facts)
        bare = length - count * self.facts.cost
        while True:  # until there are lines to put facts between: some files are one long table
            start = rng.randrange(len(self.train) - bare)
            window = self.train[start : start + bare].astype(np.int64)
            if len(self.facts.line_starts(window.tolist())) > 8:
                break
        if rng.random() < self.rename_share:
            window = self.rename(window, np.random.default_rng(rng.getrandbits(64)))
        return self.facts.write(window.tolist(), count, rng, max_distance=reach)


class Batches(Dataset):
    """A phase's batches: ids (B, L + 1) int64 and the loss weight of each predicted token (B, L) float32.

    Inserted lines weigh nothing, since nothing before them foretells them, except for the answers.
    """

    def __init__(self, recipe: Recipe, texts: Texts, phase: int) -> None:
        self.texts, self.phase, self.answer_weight = texts, recipe.phases[phase], recipe.answer_weight
        self.first = sum(each.steps for each in recipe.phases[:phase])

    def __len__(self) -> int:
        return self.phase.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        rows = [self._row(f"{SEED}-{self.first + step}-{row}") for row in range(self.phase.batch)]
        ids, weights = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return ids, weights

    def _row(self, seed: str) -> tuple[np.ndarray, np.ndarray]:
        length = self.phase.length + 1
        text = self.texts.draw(length, self.phase.facts, seed, self.phase.reach)
        weights = np.ones(length, dtype=np.float32)
        weights[text.inserted] = 0
        weights[[fact.answer for fact in text.facts]] = self.answer_weight
        return np.array(text.ids), weights[1:]


class Answers(Dataset):
    """Batches for distillation: ids (B, L) uint16, and which of them are learned, (B, L) bool: not inserted lines,
    but for the answers."""

    def __init__(self, settings: Distillation, texts: Texts, seed: int) -> None:
        self.settings, self.texts, self.seed = settings, texts, seed

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        settings = self.settings
        ids = np.zeros((settings.batch, settings.length), dtype=np.uint16)
        learned = np.ones(ids.shape, dtype=bool)
        for row in range(settings.batch):
            text = self.texts.draw(settings.length, settings.facts, f"distill-{SEED + self.seed}-{step}-{row}")
            ids[row] = text.ids
            learned[row, text.inserted] = False
            learned[row, [fact.answer for fact in text.facts]] = True
        return ids, learned


class Stored(Dataset):
    """The batches of `Answers` from files, as `distill` takes them: `input_ids` and `labels` (B, L).

    All runs of one seed learn from the same batches, so these are made once.
    """

    def __init__(self, ids: np.ndarray, learned: np.ndarray) -> None:
        self.ids, self.learned = ids, learned

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.ids[step].astype(np.int64))
        return {"input_ids": ids, "labels": ids.masked_fill(~torch.from_numpy(self.learned[step].copy()), IGNORED)}


def stored_batches(
    recipe: Recipe, settings: Distillation, out: Path, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Stored:
    """The distillation batches of a seed, from out/batches/; made there if they are missing."""
    facts = "-".join(map(str, settings.facts))
    name = f"{seed}-{settings.steps}x{settings.batch}x{settings.length}-facts{facts}"
    files = [out / "batches" / f"{name}.{part}.npy" for part in ("ids", "learned")]
    if not all(file.exists() for file in files):
        made = list(loader(Answers(settings, Texts(recipe, out, tokenizer), seed), workers()))
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, arrays in zip(files, zip(*made, strict=True), strict=True):
            part = file.with_name(f".{os.getpid()}.{file.name}")
            np.save(part, np.stack([np.asarray(array) for array in arrays]))
            os.replace(part, file)  # another process may have made the same meanwhile
    return Stored(*(np.load(file, mmap_mode="r") for file in files))


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
        # A worker is a fork: a row is done in a process that was spawned, whose own children would be, too, and each of
        # those imports everything anew.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=8 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )

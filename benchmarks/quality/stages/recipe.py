"""What a recipe says: corpus, base model, distillation runs, and what is measured. `recipes.py` has the recipes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEED = 2510
END_OF_TEXT = "<|endoftext|>"
BASELINES = ("full", "window_only", "ct_max", "ct_avg")
"""Rows without training: full attention, and the memories that have no parameters."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where the text comes from.

    Args:
        source: "stdlib", the standard library as `ahn.tiny.corpus` splits it; or "installed", every Python source of
            this interpreter, held out by package.
        vocabulary: tokens of the tokenizer.
        sample: characters that the tokenizer learns from.
        most: characters of training text ("installed" only), None for all there is.
    """

    source: str
    vocabulary: int
    sample: int
    most: int | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of base training with one sequence length and one density of facts.

    Facts a sequence are drawn uniformly from `facts`, their largest distance is `reach` (None: the whole sequence).
    """

    steps: int
    length: int
    batch: int
    facts: tuple[int, int]
    reach: int | None

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Training of one memory, which mimics full attention.

    Lossless totals and sinks are drawn anew each step; with `total` set the total is always that one. With `horizons`
    the heads of a layer begin by forgetting with e-folds between these numbers of tokens, evenly in the logarithm.
    """

    steps: int = 300
    length: int = 4096
    batch: int = 16
    facts: tuple[int, int] = (24, 96)
    loss: str = "kl"
    use_normalized_l2: bool = False
    total: int | None = None
    totals: tuple[int, ...] = (128, 256, 512, 1024)
    sinks: tuple[int, ...] = (0, 16, 32, 64)
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    log_every: int = 50
    horizons: tuple[float, float] | None = None
    base_lr: float = 0.0


@dataclasses.dataclass(frozen=True)
class Tier:
    """Tokens at two bits a number, of a run that is not trained for them.

    Args:
        exact: share of the budget that is kept exactly, sinks included.
        windows: how many they are, in windows of the whole budget; or
        bytes_of: as many as let the row take no more bytes than this memory does at the whole budget.
    """

    exact: float = 1.0
    windows: float = 0.0
    bytes_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the comparison: one memory, trained in one way, once a seed.

    With a tier there is nothing to train: the memory has no parameters, or is the first seed's of another run.

    Args:
        name: what tables and files call it.
        ahn: fields of `AHNConfig`; the memory is `name` if they do not say.
        changes: fields of `Distillation` that differ from the recipe's.
        seeds: trainings; each changes the batches, the windows drawn and the memory's first values.
        far: measure it at the long contexts too (the first seed only).
        tier: tokens at two bits a number besides.
        of: the run whose memory it uses.
    """

    name: str
    ahn: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    far: bool = False
    tier: Tier | None = None
    of: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `AHNConfig`, with the memory."""
        return {"memory": self.name, **self.ahn}


@dataclasses.dataclass(frozen=True)
class Context:
    """Measurements on sequences of one length.

    Args:
        length: tokens.
        budgets: lossless totals; sinks + window (+ slots) of every method, or what a tier takes the place of.
        chunks: held-out sequences for the loss, at most.
        texts: sequences with many facts.
        needle_lengths: lengths at which single facts are asked for.
        trials: needles a depth and length.
        far: a long context, for runs that ask for it.
    """

    length: int
    budgets: tuple[int, ...]
    chunks: int
    texts: int
    needle_lengths: tuple[int, ...] = ()
    trials: int = 0
    far: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The base model, its optimisation, the runs and their measurements.

    Learning rates of the base fall linearly to zero over the last share `cooldown`.
    """

    name: str
    corpus: Corpus
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    phases: tuple[Phase, ...]
    distillation: Distillation
    runs: tuple[Run, ...]
    contexts: tuple[Context, ...]
    sinks: int
    """Of every budget at evaluation."""
    matrix_lr: float = 3e-3
    matrix_decay: float = 0.8
    other_lr: float = 3e-3
    rope_theta: float = 1e6
    warmup: int = 100
    cooldown: float = 0.6
    answer_weight: float = 8.0
    rename_share: float = 0.5
    log_every: int = 50
    evaluate_every: int = 500

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def run(self, name: str) -> Run:
        """The run of this name."""
        return next(run for run in self.runs if run.name == name)

    def fingerprint(self, run: Run | None = None) -> str:
        """A digest of everything that a row depends on: data, base, and for a run its distillation."""
        content = dataclasses.asdict(self)
        for name in ("runs", "contexts", "distillation"):
            del content[name]
        if run is not None:
            trained = dataclasses.replace(self.distillation, **run.changes)
            content |= {"ahn": run.settings, "distillation": dataclasses.asdict(trained)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Task:
    """One training of a run, or a row without training (which has no seed)."""

    run: Run
    seed: int | None

    @property
    def name(self) -> str:
        """Of its files."""
        return self.run.name if not self.seed else f"{self.run.name}.{self.seed}"


def tasks(recipe: Recipe, only: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> list[Task]:
    """Every row of the recipe: baselines, the first seed of each run in its order, then the other seeds.

    `only` and `seeds` choose some: rows without training have no seed, and are left out by name alone.
    """
    found = [Task(Run(name, far=True), None) for name in BASELINES]
    found += [Task(run, seed) for run in recipe.runs for seed in ((None,) if run.tier else run.seeds)]
    found.sort(key=lambda task: task.seed or 0)
    return [t for t in found if (not only or t.run.name in only) and (not seeds or t.seed in (None, *seeds))]


def training(task: Task) -> Task | None:
    """The training, by name and seed, that a row's memory comes from; None for a memory without parameters."""
    if task.seed is not None:
        return task
    return None if task.run.of is None else Task(Run(task.run.of), 0)

"""Every number of ahn-tiny's training, in one place. `SMOKE` is the same in a shape for a CPU."""

from __future__ import annotations

import dataclasses

SEED = 2510
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
MEMORIES = ("gated_deltanet", "deltanet", "mamba2")


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


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Training of one memory: lossless totals and sinks are drawn anew each step, the student mimics full attention."""

    steps: int = 300
    length: int = 4096
    batch: int = 16
    facts: tuple[int, int] = (24, 96)
    totals: tuple[int, ...] = (128, 256, 512, 1024)
    sinks: tuple[int, ...] = (0, 16, 32, 64)
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    log_every: int = 50


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The base model and its optimisation. Learning rates fall linearly to zero over the last share `cooldown`."""

    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 672
    rope_theta: float = 1e6
    matrix_lr: float = 3e-3
    matrix_decay: float = 0.8
    other_lr: float = 3e-3
    warmup: int = 100
    cooldown: float = 0.6
    answer_weight: float = 8.0
    rename_share: float = 0.5
    log_every: int = 50
    evaluate_every: int = 500
    phases: tuple[Phase, ...] = (
        Phase(steps=400, length=1024, batch=64, facts=(8, 32), reach=256),
        Phase(steps=200, length=1024, batch=64, facts=(8, 32), reach=None),
        Phase(steps=1250, length=4096, batch=16, facts=(8, 48), reach=None),
        Phase(steps=150, length=8192, batch=8, facts=(16, 64), reach=None),
    )
    evaluation_length: int = 4096
    evaluation_chunks: int = 24
    report_chunks: int = 1000
    window: int = 224
    sinks: int = 32
    distillation: Distillation = Distillation()

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def lossless(self) -> int:
        """Tokens that measurements keep exactly: sinks + window."""
        return self.sinks + self.window


FULL = Recipe()
SMOKE = Recipe(
    hidden=64,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    mlp=128,
    warmup=5,
    log_every=5,
    evaluate_every=20,
    phases=(
        Phase(steps=20, length=256, batch=8, facts=(2, 6), reach=128),
        Phase(steps=10, length=512, batch=4, facts=(2, 12), reach=None),
    ),
    evaluation_length=512,
    evaluation_chunks=4,
    report_chunks=4,
    window=112,
    sinks=16,
    distillation=Distillation(steps=3, length=512, batch=2, facts=(4, 12), totals=(64, 128), log_every=2),
)

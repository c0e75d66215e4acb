"""Where kernels run, and the rules of the memories they are tested with."""

from __future__ import annotations

import os

import torch

from ahn.layout.state import LayerState
from ahn.ops.basis import Basis
from ahn.ops.gate import Gate
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step.reference import StepRotation
from ahn.ops.step.retained import SeenTokens
from ahn.ops.step.turn import TierTurn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set in conftest.py
DEVICE = "cpu" if INTERPRETED else "cuda"
RULES = {
    "gated_deltanet": StepRule("beta", "decay", True, 1e-6, 0.25, 1e-5, False),
    "deltanet": StepRule("beta", None, True, 1e-6, 0.25, 1e-5, False),
    "mamba2": StepRule("step", "decay", False, 1e-24, 1.0, 1e-5, True),
    "window_only": None,
}
NAMES = [name for name, rule in RULES.items() if rule is not None]


def on_device(x):
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, LayerState):
        return x.map(lambda part: part.to(DEVICE))
    if isinstance(x, StepRead | StepRotation | TierTurn | SeenTokens | Gate | Routes | Basis):
        return type(x)(**{name: on_device(part) for name, part in vars(x).items()})
    return type(x)(map(on_device, x)) if isinstance(x, tuple) else x

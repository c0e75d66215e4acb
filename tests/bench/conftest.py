"""A model of a few thousand weights on a stand whose ceilings are round numbers."""

from __future__ import annotations

import pytest
import torch
from small_shape import SHAPE
from transformers import AutoConfig, PreTrainedModel

from ahn.bench import model as bench_model
from ahn.bench.ceilings import Ceilings
from ahn.bench.stand import BenchSettings, Stand


@pytest.fixture
def model() -> PreTrainedModel:
    return bench_model.build(AutoConfig.for_model("qwen2", **SHAPE), torch.device("cpu"), torch.float32)


@pytest.fixture
def ceilings() -> Ceilings:
    """1 TB/s and 100 TFLOP/s."""
    return Ceilings(1e12, 1e14, 1, [1.0], 1, "float32", [1.0], {})


@pytest.fixture
def stand(model: PreTrainedModel, ceilings: Ceilings) -> Stand:
    """One repetition of four tokens."""
    return Stand(model, ceilings, BenchSettings(new_tokens=4, repeats=2, budget=60.0))

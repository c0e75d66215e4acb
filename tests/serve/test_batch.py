"""Batches whose rows join and leave between steps: every row gives what it gives alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from golden import relative_error
from models import EVERYTHING, adapted, tokens
from transformers import PreTrainedModel

from ahn import AHNCache
from ahn.serve.engine.batch import Batch, FixedBatch, make_batch

WINDOW, SINKS, REACH = 9, 2, 16
TOLERANCE = 1e-4
"""Of memories in float32, in another order of operations, as in tests/cache/test_rows.py. The models are float64: in a
code of few bits a number that rounds to the other side would move by far more."""


@torch.no_grad()
def read(model: PreTrainedModel, length: int, seed: int) -> AHNCache:
    cache = AHNCache.for_model(model)
    model(tokens(1, length, seed=seed).to(model.device), past_key_values=cache)
    return cache


@torch.no_grad()
def run(model: PreTrainedModel, batch: Batch, capacity: int, turns: int) -> None:
    draw, alone = random.Random(0), list[AHNCache]()
    for turn in range(turns):
        if len(alone) < capacity:
            new = read(model, draw.randint(1, 40), seed=turn)
            batch.add(new)
            alone.append(copy.deepcopy(new))
        for _ in range(draw.randint(1, 4)):
            ids = [draw.randint(2, 60) for _ in alone]
            together = batch.step(ids)
            for row, (cache, token) in enumerate(zip(alone, ids, strict=True)):
                own = model(torch.tensor([[token]], device=model.device), past_key_values=cache).logits[0, -1]
                assert relative_error(together[row], own) < TOLERANCE, (turn, row)
        assert batch.read == [cache.seen for cache in alone]
        if draw.random() < 0.5:
            row = draw.randrange(len(alone))
            taken = batch.take(row, model.device)
            assert taken.seen == alone[row].seen
            alone[row] = alone[-1]
            alone.pop()
            batch.drop(row)
    batch.empty()
    batch.add(new)
    assert (
        relative_error(
            batch.step([5])[0], model(torch.tensor([[5]], device=model.device), past_key_values=new).logits[0, -1]
        )
        < TOLERANCE
    )
    batch.clear()
    assert len(batch) == 0


@pytest.mark.sample(2)
@pytest.mark.parametrize("quantized", [pytest.param(0, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("memory", ["gated_deltanet", "retained", pytest.param("ct_max", marks=pytest.mark.slow)])
def test_rows_come_and_go(memory: str, fixed: bool, quantized: int) -> None:
    model = adapted(memory=memory, window=WINDOW, sinks=SINKS, quantized=quantized, max_distance=REACH).double()
    run(model, FixedBatch(model, 5) if fixed else Batch(model), capacity=5, turns=6)


@torch.no_grad()
def test_fixed_places_say_what_is_left_to_prepare() -> None:
    model = adapted(window=WINDOW, sinks=SINKS)
    batch, prepared = FixedBatch(model, 3), []
    for size in (1, 2, 3):
        batch.add(read(model, 20, seed=size))
        prepared.append(batch.prepared)
        batch.step([5] * size)
        prepared.append(batch.prepared)
    assert batch.sizes == [1, 2, 3] and prepared == [False, True] * 3
    batch.drop(0)
    assert batch.prepared
    batch.clear()
    assert not batch.prepared


@pytest.mark.slow
@pytest.mark.parametrize("memory", EVERYTHING)
def test_rows_come_and_go_for_long(memory: str) -> None:
    model = adapted(memory=memory, window=WINDOW, sinks=SINKS, quantized=6, max_distance=REACH).double()
    for batch in (FixedBatch(model, 6), Batch(model)):
        run(model, batch, capacity=6, turns=40)


def test_sizes_are_few() -> None:
    model = adapted(window=WINDOW)
    assert FixedBatch(model, 100).sizes == [1, 2, 4, 8, 16, 32, 64, 100]
    assert FixedBatch(model, 1).sizes == [1] and FixedBatch(model, 8).sizes == [1, 2, 4, 8]


def test_a_cpu_steps_without_capture() -> None:
    model = adapted(window=WINDOW, sinks=SINKS)
    assert type(make_batch(model, 4, read(model, 3, 0))) is Batch

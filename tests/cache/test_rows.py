"""Conversations that were read apart give the same in one batch as alone, and go apart again."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from golden import relative_error
from models import EVERYTHING, adapted, tokens
from torch import Tensor
from transformers import PreTrainedModel

from ahn import AHNCache, AHNError
from ahn.cache import sinks
from ahn.cache.rows import join, lengths, mask, put, take
from ahn.memory.deltanet import DeltaNet

WINDOW, SINKS, QUANTIZED = 9, 2, 6
CPU = torch.device("cpu")
LOSSLESS = WINDOW + SINKS
REACH = 16
"""Positions that the base may be trusted with: sinks of longer rows are moved along."""
TOLERANCE = 1e-4
"""float32, where products of batches of another size are summed in another order, through two layers with sharp
attention and some tens of steps; see tests/cache/test_cache.py."""
OFTEN = {("gated_deltanet", 0), ("gated_deltanet", QUANTIZED), ("retained", QUANTIZED), ("ct_max", 0)}
KINDS = [
    kind if kind in OFTEN else pytest.param(*kind, marks=pytest.mark.slow)
    for kind in itertools.product(EVERYTHING, (0, QUANTIZED))
]
EDGES = [1, LOSSLESS - 1, LOSSLESS, LOSSLESS + 1, LOSSLESS + QUANTIZED, LOSSLESS + QUANTIZED + 1, 40]


def student(memory: str, quantized: int, architecture: str = "qwen3", **config: Any) -> PreTrainedModel:
    own = {"window": WINDOW, "sinks": SINKS, "quantized": quantized, "max_distance": REACH}
    model = adapted(architecture, memory=memory, **own | config)
    # In a code of few bits a number that rounds to the other side would move by far more than float32 rounds.
    return model.double() if quantized else model


@torch.no_grad()
def read(model: PreTrainedModel, length: int, seed: int) -> AHNCache:
    cache = AHNCache.for_model(model)
    model(tokens(1, length, seed=seed), past_key_values=cache)
    return cache


@torch.no_grad()
def step(model: PreTrainedModel, batch: AHNCache, ids: Tensor) -> Tensor:
    """Logits (B, V) of one token a row."""
    places = torch.tensor(lengths(batch))[:, None]
    options = {"attention_mask": mask(batch)} if mask(batch) is not None else {}
    return model(ids[:, None], position_ids=places, past_key_values=batch, **options).logits[:, 0]


class Rows:
    """Conversations in one batch, each beside itself alone."""

    def __init__(self, model: PreTrainedModel, read_before: list[int]) -> None:
        self.model = model
        self.alone = [read(model, length, seed) for seed, length in enumerate(read_before)]
        self.batch = join(self.alone)
        self.alone = [copy.deepcopy(cache) for cache in self.alone]
        self.generator = torch.Generator().manual_seed(1)

    def steps(self, count: int) -> None:
        for _ in range(count):
            ids = torch.randint(2, 61, (len(self.alone),), generator=self.generator)
            together = step(self.model, self.batch, ids)
            for row, cache in enumerate(self.alone):
                own = step(self.model, cache, ids[row : row + 1])[0]
                assert relative_error(together[row], own) < TOLERANCE, (row, cache.seen)
                assert int(together[row].argmax()) == int(own.argmax())

    def rejoin(self, order: list[int]) -> None:
        self.batch = join([take(self.batch, row, CPU) for row in order])
        self.alone = [self.alone[row] for row in order]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("memory", "quantized"), KINDS)
def test_rows_of_any_length_step_together(memory: str, quantized: int) -> None:
    rows = Rows(student(memory, quantized), [1, LOSSLESS - 1, LOSSLESS + QUANTIZED, 40])
    rows.steps(3)
    rows.rejoin([2, 0, 3])
    rows.steps(4)
    rows.batch = join([rows.batch, read(rows.model, 6, seed=99)])
    rows.alone.append(read(rows.model, 6, seed=99))
    rows.steps(5)


def test_a_memory_that_does_not_begin_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of which nothing was written reads nothing, as it does alone."""
    start = torch.randn(4, 16, 16)
    monkeypatch.setattr(DeltaNet, "init_state", lambda self, batch, device: {"state": start.expand(batch, -1, -1, -1)})
    monkeypatch.setattr(DeltaNet, "step_rule", lambda self: None)
    Rows(student("deltanet", 0), [1, LOSSLESS - 1, 40]).steps(3)


@pytest.mark.parametrize("together", [sinks.TOGETHER, 1], ids=["layers together", "one by one"])
def test_sinks_that_are_read_after_those_of_others_were_moved_stay(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "TOGETHER", together)
    rows = Rows(student("gated_deltanet", 0), [1, 40, 42])
    rows.steps(12)  # sinks of the longer rows are moved along every four steps, and not at the same one


@pytest.mark.sample(1)
@pytest.mark.parametrize("architecture", ["gemma3", "gpt_oss"])
def test_layers_without_a_memory_go_along(architecture: str) -> None:
    rows = Rows(student("gated_deltanet", 0, architecture, max_distance=0), [3, 14, 30])
    rows.steps(3)
    rows.rejoin([2, 0])
    rows.steps(9)
    rows.rejoin([1])
    rows.steps(2)


def test_layers_with_full_attention_go_along() -> None:
    rows = Rows(student("deltanet", 0, full_attention_layers=(0,)), [3, 14, 30])
    rows.steps(3)
    rows.rejoin([1, 0])
    rows.steps(9)


@pytest.mark.sample(1)
@pytest.mark.parametrize("quantized", [pytest.param(0, marks=pytest.mark.slow), QUANTIZED])
def test_a_row_is_what_it_was(quantized: int) -> None:
    """Bit for bit: a row in slots and one in columns hold the same numbers."""
    for memory in ("gated_deltanet", "retained", "ct_max"):
        model = student(memory, quantized)
        before = [read(model, length, seed=0) for length in EDGES]
        batch = join(before)
        for row, cache in enumerate(before):
            after = take(batch, row, CPU)
            assert after.seen == cache.seen == EDGES[row] and after.progress.anchor == cache.progress.anchor
            for own, other in zip(after.layers, cache.layers, strict=True):
                named, wanted = own.tensors(), other.tensors()
                assert named.keys() == wanted.keys()
                assert all(torch.equal(named[name], x) for name, x in wanted.items())


@pytest.mark.sample(1)
@pytest.mark.parametrize("quantized", [pytest.param(0, marks=pytest.mark.slow), QUANTIZED])
def test_a_row_is_replaced_in_place(quantized: int) -> None:
    for memory in ("gated_deltanet", "retained"):
        rows = Rows(student(memory, quantized), [30, 4])
        tensors = {id(layer.keys) for layer in rows.batch.layers}
        for seed, length in enumerate([1, 45, LOSSLESS], start=50):
            put(rows.batch, 1, read(rows.model, length, seed))
            assert {id(layer.keys) for layer in rows.batch.layers} == tensors
            rows.alone[1] = read(rows.model, length, seed)
            rows.steps(1)
            tensors = {id(layer.keys) for layer in rows.batch.layers}


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [0, QUANTIZED])
@pytest.mark.parametrize("memory", EVERYTHING)
def test_rows_come_and_go_at_random(memory: str, quantized: int) -> None:
    draw = random.Random(0)
    rows = Rows(student(memory, quantized), [draw.randint(1, 60) for _ in range(5)])
    for turn in range(12):
        rows.steps(draw.randint(1, 6))
        rows.rejoin(draw.sample(range(len(rows.alone)), draw.randint(1, len(rows.alone))))
        new = draw.randint(1, 60)
        rows.batch = join([rows.batch, read(rows.model, new, seed=100 + turn)])
        rows.alone.append(read(rows.model, new, seed=100 + turn))


def test_a_taken_row_can_be_saved(tmp_path: Any) -> None:
    for memory in ("gated_deltanet", "retained", "ct_avg"):
        model = student(memory, QUANTIZED)
        batch = join([read(model, length, seed=length) for length in (3, 14, 40)])
        for row, length in enumerate((3, 14, 40)):
            take(batch, row, CPU).save(tmp_path / "row")
            assert AHNCache.load(tmp_path / "row", model).seen == length


def test_what_cannot_be_in_one_batch_is_refused() -> None:
    model = student("deltanet", 0)
    with pytest.raises(AHNError, match="read nothing"):
        join([read(model, 3, 0), AHNCache.for_model(model)])
    with pytest.raises(AHNError, match="different models"):
        join([read(model, 3, 0), read(student("deltanet", 0), 3, 0)])
    other = read(model, 3, 0)
    other.config = other.config.replace(window=WINDOW + 1)
    with pytest.raises(AHNError, match="different windows"):
        join([read(model, 3, 0), other])

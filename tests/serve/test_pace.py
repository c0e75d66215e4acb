"""What is read between two steps takes about as long as a step."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest
import torch
from engines import SINKS, WINDOW, alone, engine, prompt, request, whole
from models import adapted
from support.effort import slow
from torch import nn

from ahn.serve.engine.pace import LayerPauses, Pace
from ahn.serve.engine.scheduler import Scheduler


@pytest.mark.parametrize("step", [0.001, 0.01, 0.05, 10.0])
def test_chunks_find_their_size(step: float) -> None:
    pace, per_token, start = Pace(512, 32), 1e-3, 2e-3
    for _ in range(30):
        pace.stepped(step)
        pace.read(pace.chunk(True), start + per_token * pace.size)
    took = start + per_token * pace.size
    assert took <= step or pace.size == 32
    assert took >= 0.3 * step or pace.size == 512


def test_while_nobody_writes_chunks_are_large() -> None:
    pace = Pace(512, 32)
    assert pace.chunk(False) == 512 and pace.chunk(True) == 32
    pace.read(32, 0.001)  # no step was taken yet
    pace.stepped(1.0)
    pace.read(5, 0.001)  # the end of a prompt
    assert pace.chunk(True) == 32
    pace.read(32, 0.001)
    assert pace.chunk(True) == 64


def test_a_chunk_may_be_smaller_than_any_that_is_worth_it() -> None:
    assert Pace(16, 512).chunk(True) == 16


def test_steps_come_before_the_next_chunk_where_a_chunk_takes_long() -> None:
    pace, chunks = Pace(512, 32), 0
    for _ in range(100):
        if pace.may_read(writing=True):
            pace.read(32, 0.1)
            chunks += 1
        pace.stepped(0.01)
    # A chunk and the steps before the next, of which each counts half as much again, take the same time.
    assert 10 <= chunks <= 16
    pace.read(32, 0.1)
    assert pace.may_read(writing=False) and not pace.may_read(writing=True)


@pytest.mark.parametrize("step, taken", [(0.0, 7), (0.012, 3), (10.0, 0)])
def test_replies_step_between_layers_when_it_is_time(monkeypatch: pytest.MonkeyPatch, step: float, taken: int) -> None:
    now, steps = 0.0, 0

    class SlowLayer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += 0.005 if threading.current_thread() is threading.main_thread() else 0
            return x

    def take() -> None:
        nonlocal steps
        steps += 1
        layers(torch.zeros(1))  # a step goes through the same layers

    monkeypatch.setattr("ahn.serve.engine.pace.time", types.SimpleNamespace(perf_counter=lambda: now))
    layers, pace = nn.Sequential(*(SlowLayer() for _ in range(8))), Pace(512, 32)
    pace.stepped(step)
    pauses = LayerPauses(layers, pace, take, torch.device("cpu"))
    with pauses.hooked():
        other = threading.Thread(target=lambda: layers(torch.zeros(1)))  # another's use of the model
        other.start()
        other.join()
        assert steps == 0
        layers(torch.zeros(1))
    assert steps == taken and pauses.layer == pytest.approx(0.005 * 8 / 9)  # and nothing before the first
    layers(torch.zeros(1))
    assert steps == taken


@pytest.mark.parametrize("architecture, fails", [("qwen3", False), ("qwen3", True), slow("gemma3", False)])
def test_steps_between_layers_change_no_text(monkeypatch: pytest.MonkeyPatch, architecture: str, fails: bool) -> None:
    monkeypatch.setattr(Pace, "piece", 0.0)  # a step before each layer
    of, inside, failures = adapted(architecture, window=WINDOW, sinks=SINKS), 0, 0
    right = Scheduler._step

    def counted(self: Scheduler) -> bool:
        nonlocal inside, failures
        within = any(getattr(reading, "being_read", False) for reading in self.reading)
        inside += within
        if within and fails and not failures:
            failures += 1
            monkeypatch.setattr(self.batch, "step", broken)
        return right(self)

    def broken(*_: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("once")

    read = Scheduler._read_chunk

    def marked(self: Scheduler, job: Any) -> None:
        job.being_read = True
        try:
            read(self, job)
        finally:
            job.being_read = False

    monkeypatch.setattr(Scheduler, "_step", counted)
    monkeypatch.setattr(Scheduler, "_read_chunk", marked)
    with engine(of) as running:
        first = running.submit(request(prompt(20), 60))
        others = [running.submit(request(prompt(100, seed=n), 4)) for n in (1, 2)]
        assert whole(first).tokens == alone(of, prompt(20), 60)
        assert [whole(other).tokens for other in others] == [alone(of, prompt(100, seed=n), 4) for n in (1, 2)]
    assert inside > 10 or fails
    assert failures == fails

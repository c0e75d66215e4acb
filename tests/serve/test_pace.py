"""Chunks that are read between two steps take about as long as a step."""

from __future__ import annotations

import pytest

from ahn.serve.engine.pace import Pace


@pytest.mark.parametrize("step", [0.001, 0.01, 0.05, 10.0])
def test_chunks_find_their_size(step: float) -> None:
    pace, per_token, start = Pace(512, 32), 1e-3, 2e-3
    for _ in range(30):
        pace.stepped(step)
        pace.read(pace.chunk(True), start + per_token * pace.size)
    took = start + per_token * pace.size
    assert took <= 1.5 * step or pace.size == 32
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

"""The window schedule obeys docs/spec.md, section 6, and depends on (seed, step, length) alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahn.errors import AHNError
from ahn.training.schedule import SINKS, TOTALS, WindowDraw, WindowSchedule


@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), length=st.integers(33, 65535))
def test_random_draw_obeys_the_rule(seed: int, step: int, length: int) -> None:
    draw = WindowSchedule(seed=seed).draw(step, length)
    assert draw.lossless in TOTALS
    assert length / 8 < draw.lossless < length
    assert draw.sinks in SINKS
    assert draw.sinks <= draw.lossless / 2
    assert draw == WindowSchedule(seed=seed).draw(step, length)


def test_every_allowed_candidate_is_drawn_about_equally_often() -> None:
    """At L = 4096, T > 512 leaves 1024 and 2048; the counts of 4000 fair draws stay within 5 standard deviations."""
    schedule = WindowSchedule(seed=3)
    draws = [schedule.draw(step, 4096) for step in range(4000)]
    counts = Counter(draw.lossless for draw in draws)
    assert set(counts) == {1024, 2048}
    assert abs(counts[1024] - 2000) < 5 * (4000 * 0.25) ** 0.5
    # All of 0, 32, 64, 128, 512 are at most half of both totals.
    sinks = Counter(draw.sinks for draw in draws)
    assert set(sinks) == {0, 32, 64, 128, 512}
    assert all(abs(n - 800) < 5 * (4000 * 0.2 * 0.8) ** 0.5 for n in sinks.values())


def test_draws_are_pinned() -> None:
    """The same in every process and on every machine; a change would break the resume of runs started before it."""
    schedule = WindowSchedule(seed=0)
    assert [tuple(schedule.draw(step, 4096)[:2]) for step in range(4)] == [
        (1920, 128),
        (512, 512),
        (960, 64),
        (1536, 512),
    ]


def test_seed_step_and_length_all_matter() -> None:
    def draws(seed: int, steps: range, length: int) -> list[WindowDraw]:
        return [WindowSchedule(seed=seed, lower_ratio=0).draw(step, length) for step in steps]

    base = draws(0, range(20), 9000)
    assert base != draws(1, range(20), 9000)
    assert base != draws(0, range(20, 40), 9000)
    assert base != draws(0, range(20), 9001)


def test_small_models_reach_down_to_64() -> None:
    """The ratio is exclusive: 4096 / 128 = 32 itself is not drawn."""
    schedule = WindowSchedule(lower_ratio=1 / 128)
    assert {schedule.draw(step, 4096).lossless for step in range(300)} == {64, 128, 256, 512, 1024, 2048}


def test_fixed_and_linear() -> None:
    fixed = WindowSchedule(sliding_window_type="fixed", total=300, ahn_position="prefix")
    assert fixed.draw(5, 1000) == WindowDraw(window=300, sinks=0)
    linear = WindowSchedule(sliding_window_type="linear", ahn_position="prefix")
    assert linear.draw(0, 8192).lossless == 2048
    assert linear.draw(0, 1024).lossless == 512
    one = WindowSchedule(sliding_window_type="fixed", total=300, sink_candidates=(128,))
    assert one.draw(9, 1000) == WindowDraw(window=172, sinks=128)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"sliding_window_type": "cosine"}, "cosine"),
        ({"ahn_position": "suffix"}, "suffix"),
        ({"total": 64}, "total"),
        ({"sliding_window_type": "fixed"}, "total"),
        ({"sliding_window_type": "fixed", "total": 0}, "at least 1"),
        ({"lower_ratio": 1.0}, "lower_ratio"),
        ({"totals": ()}, "totals"),
        ({"totals": (0, 4)}, "totals"),
        ({"sink_candidates": (-1,)}, "sink_candidates"),
        ({"positions": -1}, "positions"),
    ],
)
def test_wrong_schedules_are_refused(fields: dict, word: str) -> None:
    with pytest.raises(AHNError, match=word):
        WindowSchedule(**fields)


@pytest.mark.parametrize(
    ("schedule", "length"),
    [
        (WindowSchedule(), 32),  # T < 32 is no candidate
        (WindowSchedule(), 65536),  # T > 8192 is none either
        (WindowSchedule(sliding_window_type="fixed", total=64), 64),
        (WindowSchedule(sliding_window_type="linear"), 512),
        (WindowSchedule(sink_candidates=(4096,)), 1000),
    ],
)
def test_lengths_without_a_draw_are_refused(schedule: WindowSchedule, length: int) -> None:
    with pytest.raises(AHNError, match=r"total"):
        schedule.draw(0, length)


@given(step=st.integers(0, 10**6), length=st.integers(300, 5000), positions=st.integers(0, 9000))
def test_a_sequence_ends_by_the_last_position(step: int, length: int, positions: int) -> None:
    start = WindowSchedule(positions=positions).draw(step, length).start
    assert 0 <= start <= max(0, positions - length)


def test_starts_are_spread_evenly_and_change_no_window() -> None:
    moved, still = WindowSchedule(positions=1300), WindowSchedule()
    draws = [moved.draw(step, 300) for step in range(4000)]
    assert [draw[:2] for draw in draws] == [still.draw(step, 300)[:2] for step in range(4000)]
    assert all(still.draw(step, 300).start == 0 for step in range(100))
    # 4 000 draws of 1 001 numbers: the mean is 500 to 1 001 / sqrt(12 · 4 000), six standard errors of which are 27.
    assert abs(sum(draw.start for draw in draws) / len(draws) - 500) < 28

"""Intervals of shares, against published ones."""

from __future__ import annotations

import pytest

from ahn.measure.intervals import wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (1, 20, 0.0089, 0.2361)],
)
def test_the_closed_form(hits: int, total: int, low: float, high: float) -> None:
    """To the four digits that statistics packages print."""
    assert wilson(hits, total) == pytest.approx((low, high), abs=6e-5)


def test_the_tables_of_a_paper() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_no_trials_say_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)

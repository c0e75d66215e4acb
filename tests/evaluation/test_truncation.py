"""Which tokens of a prompt stay."""

from __future__ import annotations

import pytest

from ahn.errors import AHNError
from ahn.evaluation.truncation import keep_last, middle_halves, truncate_middle

TOKENS = list(range(10))


def test_the_middle_goes() -> None:
    assert middle_halves(TOKENS, 6) == ([0, 1, 2], [7, 8, 9])
    assert truncate_middle(TOKENS, 6) == [0, 1, 2, 7, 8, 9]
    assert truncate_middle(TOKENS, 7) == [0, 1, 2, 7, 8, 9]  # int(7 / 2) twice: the benchmarks keep one fewer


def test_within_the_limit_nothing_goes() -> None:
    assert middle_halves(TOKENS, 10) == (TOKENS, [])
    assert truncate_middle(TOKENS, 10) == keep_last(TOKENS, 10, 4) == TOKENS


def test_the_last_tokens_stay_with_room_for_the_answer() -> None:
    assert keep_last(TOKENS, 9, 4) == [5, 6, 7, 8, 9]


def test_limits_that_leave_nothing() -> None:
    with pytest.raises(AHNError, match="2 or more"):
        truncate_middle(TOKENS, 1)
    with pytest.raises(AHNError, match="raise the limit"):
        keep_last(TOKENS, 4, 4)

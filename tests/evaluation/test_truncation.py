"""Which tokens of a prompt stay."""

from __future__ import annotations

from typing import Literal

import pytest

from ahn.errors import AHNError
from ahn.evaluation.prompt import kept
from ahn.evaluation.task import Truncation

TOKENS = list(range(10))


@pytest.mark.parametrize(
    ("keep", "limit", "parts"),
    [
        ("halves", 6, ([0, 1, 2], [7, 8, 9])),
        ("middle-cut", 6, ([0, 1, 2, 7, 8, 9],)),
        ("middle-cut", 7, ([0, 1, 2, 7, 8, 9],)),  # int(7 / 2) twice: the benchmarks keep one fewer
        ("last", 9, ([5, 6, 7, 8, 9],)),  # with room for the answer
        ("halves", 10, (TOKENS,)),
        ("middle-cut", 10, (TOKENS,)),
        ("last", 10, (TOKENS,)),
    ],
)
def test_what_stays(keep: Literal["halves", "middle-cut", "last"], limit: int, parts: tuple[list[int], ...]) -> None:
    assert kept(TOKENS, Truncation(keep, limit), 4) == parts


def test_limits_that_leave_nothing() -> None:
    with pytest.raises(AHNError, match="2 or more"):
        kept(TOKENS, Truncation("middle-cut", 1), 4)
    with pytest.raises(AHNError, match="raise the limit"):
        kept(TOKENS, Truncation("last", 4), 4)

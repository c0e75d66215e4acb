"""Which cases `make test` keeps of a test with the marker `sample(n)`."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import effort


def cases(*sizes: int) -> list[Any]:
    """One for each combination of parameters with so many values."""
    every = itertools.product(*(range(size) for size in sizes))
    return [SimpleNamespace(callspec=SimpleNamespace(indices=dict(enumerate(places)))) for places in every]


@pytest.mark.parametrize("sizes", [(5,), (4, 3), (2, 3, 4)])
def test_each_value_is_among_as_few_cases_as_the_longest_parameter_has(sizes: tuple[int, ...]) -> None:
    kept = [case.callspec.indices for case in effort.spread(cases(*sizes), max(sizes))]
    assert len(kept) == max(sizes)
    for parameter, size in enumerate(sizes):
        assert {places[parameter] for places in kept} == set(range(size))


def test_no_more_than_there_are() -> None:
    assert len(effort.spread(cases(2, 2), 9)) == 4


def test_slow_cases_are_not_among_them(request: pytest.FixtureRequest) -> None:
    """As pytest makes them: of four cases, the first slow by itself, two stay."""

    def made(slow: bool) -> pytest.Function:
        item = pytest.Function.from_parent(request.node.parent, name="example", callobj=lambda: None)
        item.path, item.callspec = Path("example.py"), SimpleNamespace(indices={"x": len(items)})
        item.add_marker(pytest.mark.sample(2))
        if slow:
            item.add_marker(pytest.mark.slow)
        return item

    items: list[pytest.Function] = []
    for slow in (True, False, False, False):
        items.append(made(slow))
    effort.mark_what_is_left_out(list(items))
    assert [item.get_closest_marker("slow") is None for item in items] == [False, True, True, False]

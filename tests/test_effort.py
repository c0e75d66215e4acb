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
    return [SimpleNamespace(callspec=SimpleNamespace(params=dict(enumerate(places)))) for places in every]


@pytest.mark.parametrize("sizes", [(5,), (4, 3), (2, 3, 4)])
def test_each_value_is_among_as_few_cases_as_the_longest_parameter_has(sizes: tuple[int, ...]) -> None:
    kept = [case.callspec.params for case in effort.spread(cases(*sizes), max(sizes))]
    assert len(kept) == max(sizes)
    for parameter, size in enumerate(sizes):
        assert {places[parameter] for places in kept} == set(range(size))


@pytest.mark.sample(3)
@pytest.mark.parametrize("one", ["a", "b", "c"])
@pytest.mark.parametrize(("two", "three"), [(1, [0]), (2, [0]), (3, [])])
def test_so_it_is_with_the_cases_that_pytest_makes(
    one: str, two: int, three: list[int], request: pytest.FixtureRequest
) -> None:
    items = [item for item in request.node.parent.collect() if item.originalname == request.node.originalname]
    assert len(items) == 9
    effort.mark_what_is_left_out(items)
    kept = [item.callspec.params for item in items if item.get_closest_marker("slow") is None]
    assert len(kept) == 3 and {case["one"] for case in kept} == {"a", "b", "c"}
    assert {case["two"] for case in kept} == {1, 2, 3}


def test_no_more_than_there_are() -> None:
    assert len(effort.spread(cases(2, 2), 9)) == 4


def test_slow_cases_are_not_among_them(request: pytest.FixtureRequest) -> None:
    """As pytest makes them: of four cases, the first slow by itself, two stay."""

    def made(slow: bool) -> pytest.Function:
        item = pytest.Function.from_parent(request.node.parent, name="example", callobj=lambda: None)
        item.path, item.callspec = Path("example.py"), SimpleNamespace(params={"x": len(items)})
        item.add_marker(pytest.mark.sample(2))
        if slow:
            item.add_marker(pytest.mark.slow)
        return item

    items: list[pytest.Function] = []
    for slow in (True, False, False, False):
        items.append(made(slow))
    effort.mark_what_is_left_out(list(items))
    assert [item.get_closest_marker("slow") is None for item in items] == [False, True, True, False]

"""How thoroughly to look: `make test` leaves out what is marked slow, `make test-all` takes it in and draws more."""

from __future__ import annotations

from collections import Counter

import pytest

everything = False
"""Whether slow tests run too: set in conftest.py, before test modules are imported."""


def examples(usual: int, thorough: int) -> int:
    """How many examples Hypothesis draws."""
    return thorough if everything else usual


def slow(*values: object, id: str | None = None) -> object:
    """A case of `parametrize` that proves little beyond the others and takes long."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def mark_what_is_left_out(items: list[pytest.Item]) -> None:
    """Mark as slow all but n cases of each test that has the marker `sample(n)`: those that share most with the others.

    Which ones stay does not change from run to run, and among them is each value of each parameter, if n is enough.
    Cases that are slow by themselves are not among the n.
    """
    for cases in _cases_by_test(items).values():
        for case in set(cases) - set(spread(cases, cases[0].get_closest_marker("sample").args[0])):
            case.add_marker(pytest.mark.slow)


def _cases_by_test(items: list[pytest.Item]) -> dict[str, list[pytest.Function]]:
    """The cases of each test that has the marker `sample`, but for those that are slow."""
    found: dict[str, list[pytest.Function]] = {}
    for item in items:
        sampled = isinstance(item, pytest.Function) and item.get_closest_marker("sample")
        if sampled and not item.get_closest_marker("slow"):
            found.setdefault(f"{item.path}::{item.originalname}", []).append(item)
    return found


def spread(cases: list[pytest.Function], n: int) -> list[pytest.Function]:
    """n cases, each the first of those with the most values of parameters that were not seen yet, or least often."""
    chosen: list[pytest.Function] = []
    times: Counter[tuple[str, str]] = Counter()
    while len(chosen) < min(n, len(cases)):
        rest = [case for case in cases if case not in chosen]
        case = min(rest, key=lambda case: sum(times[value] for value in _values(case)))
        chosen.append(case)
        times.update(_values(case))
    return chosen


def _values(case: pytest.Function) -> list[tuple[str, str]]:
    """Each parameter with what tells its value from the others: `callspec.indices` would be the case's own number."""
    return [(name, repr(value)) for name, value in case.callspec.params.items()]

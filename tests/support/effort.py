"""How thoroughly to look: `make test` leaves out what is marked slow, `make test-all` takes it in and draws more."""

from __future__ import annotations

import pytest

everything = False
"""Whether slow tests run too: set in conftest.py, before test modules are imported."""


def examples(usual: int, thorough: int) -> int:
    """How many examples Hypothesis draws."""
    return thorough if everything else usual


def slow(*values: object, id: str | None = None) -> object:
    """A case of `parametrize` that proves little beyond the others and takes long."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)

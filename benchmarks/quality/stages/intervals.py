"""How sure a number is: 95 % intervals of shares and of means over documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.96
RESAMPLES = 2000
SEED = 0


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score (E. B. Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    share, spread = hits / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    value: Callable[..., np.ndarray], columns: Sequence[np.ndarray], sources: Sequence[str]
) -> tuple[float, float, float]:
    """A function of means over sequences, and its 95 % interval when documents are drawn anew.

    Sequences of one document resemble each other, so they are drawn together.

    Args:
        value: takes the mean of each column, numbers or arrays of them, and works element by element.
        columns: each (N,), a number a sequence.
        sources: (N,) the document of each sequence.
    """
    names, index = np.unique(np.asarray(sources), return_inverse=True)
    sums = [np.bincount(index, weights=column, minlength=len(names)) for column in columns]
    counts = np.bincount(index, minlength=len(names))
    drawn = np.random.default_rng(SEED).integers(len(names), size=(RESAMPLES, len(names)))
    sizes = counts[drawn].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = float(value(*(total.sum() / counts.sum() for total in sums)))
        found = value(*(total[drawn].sum(1) / sizes for total in sums))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return whole, float(low), float(high)

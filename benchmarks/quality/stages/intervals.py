"""How sure a number is: 95 % intervals of means over documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
SEED = 0


def bootstrap(
    value: Callable[..., np.ndarray], columns: Sequence[np.ndarray], sources: Sequence[str]
) -> tuple[float, float, float]:
    """A function of means over sequences, and its 95 % interval when documents, and seeds, are drawn anew.

    Sequences of one document resemble each other, so they are drawn together. Of three seeds an interval comes out too
    narrow; of one it does not contain what another training would change.

    Args:
        value: takes the mean of each column, numbers or arrays of them, and works element by element.
        columns: each (N,), a number a sequence, or (S, N), a row for each of S seeds. Seeds are paired: all such
            columns have the same S, in the same order.
        sources: (N,) the document of each sequence.
    """
    names, index = np.unique(np.asarray(sources), return_inverse=True)
    counts = np.bincount(index, minlength=len(names))
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(len(names), size=(RESAMPLES, len(names)))
    sizes = counts[drawn].sum(1)
    several = {len(column) for column in columns if column.ndim == 2}
    if len(several) > 1:
        raise ValueError(f"Columns of {sorted(several)} seeds cannot be paired.")
    count = max(several, default=1)
    picked = generator.multinomial(count, [1 / count] * count, size=RESAMPLES) / count  # (R, S) each seed's weight
    wholes, resampled = [], []
    for column in columns:
        rows = np.atleast_2d(column)
        sums = np.stack([np.bincount(index, weights=row, minlength=len(names)) for row in rows])
        wholes.append(sums.sum() / (len(rows) * counts.sum()))
        found = sums[:, drawn].sum(2).T  # (R, S)
        resampled.append((found * picked).sum(1) / sizes if len(rows) == count else found[:, 0] / sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = float(value(*wholes))
        found = value(*resampled)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return whole, float(low), float(high)

"""F1 between two bags of tokens (`f1_score` in LV-Eval, LongBench and InfiniteBench)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence


def shared_tokens(prediction: Sequence[str], reference: Sequence[str], ignored: Collection[str] = ()) -> int:
    """How many tokens both have, each counted as often as in the one that has fewer; `ignored` ones do not count."""
    common = Counter(prediction) & Counter(reference)
    return sum(count for token, count in common.items() if token not in ignored)


def token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall, 0 when nothing is shared (so also when either is empty)."""
    shared = shared_tokens(prediction, reference)
    if shared == 0:
        return 0.0
    precision = shared / len(prediction)
    recall = shared / len(reference)
    return 2 * precision * recall / (precision + recall)

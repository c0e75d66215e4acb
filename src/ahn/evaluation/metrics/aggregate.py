"""From the scores of samples to those of tasks, lengths and benchmarks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from ahn.errors import AHNError

Key = TypeVar("Key", bound=Hashable)


def task_score(scores: Iterable[float]) -> float:
    """Mean of the samples' scores in percent, two decimals (`scorer` in LV-Eval and LongBench, RULER's metrics).

    Both profiles use it. InfiniteBench's own script prints the unrounded fraction.

    Raises:
        AHNError: there are no scores.
    """
    total, number = 0.0, 0
    for value in scores:  # one by one as the scorers do: sum() rounds otherwise since Python 3.12
        total, number = total + value, number + 1
    if number == 0:
        raise AHNError("A task without a single scored sample has no score.")
    return round(100 * total / number, 2)


def score_by(scored: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    """`task_score` of each group, such as a length level, in order of first appearance.

    Args:
        scored: (group, score) of each sample.
    """
    groups: dict[Key, list[float]] = {}
    for key, value in scored:
        groups.setdefault(key, []).append(value)
    return {key: task_score(values) for key, values in groups.items()}


def longbench_length_group(length: int) -> str:
    """LongBench-E's group of a sample with that many words (`scorer_e` in eval.py)."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


def benchmark_score(tasks: Mapping[str, float]) -> float:
    """Unweighted mean of the tasks' (rounded) scores: a task counts once however many samples it has.

    Raises:
        AHNError: there are no tasks.
    """
    if not tasks:
        raise AHNError("A benchmark without a single scored task has no score.")
    return sum(tasks.values()) / len(tasks)

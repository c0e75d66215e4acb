"""From the scores of samples to those of tasks, lengths and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ahn.errors import AHNError


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


def benchmark_score(tasks: Mapping[str, float]) -> float:
    """Unweighted mean of the tasks' (rounded) scores: a task counts once however many samples it has.

    Raises:
        AHNError: there are no tasks.
    """
    if not tasks:
        raise AHNError("A benchmark without a single scored task has no score.")
    return sum(tasks.values()) / len(tasks)

"""The benchmarks' metrics: plain functions on strings, equal to the official code to 1e-9."""

from ahn.evaluation.metrics.aggregate import benchmark_score, task_score
from ahn.evaluation.metrics.clean import clean_prediction
from ahn.evaluation.metrics.registry import METRICS, OVER_ALL_ANSWERS, PROFILES, metric_name, score

__all__ = [
    "METRICS",
    "OVER_ALL_ANSWERS",
    "PROFILES",
    "benchmark_score",
    "clean_prediction",
    "metric_name",
    "score",
    "task_score",
]

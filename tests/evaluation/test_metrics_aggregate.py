"""From samples to tasks and benchmarks, and what a profile scores of a prediction."""

from __future__ import annotations

import pytest

from ahn.evaluation.metrics import task_score
from ahn.evaluation.metrics.clean import clean_prediction
from ahn.evaluation.results import averages


def test_task_score_is_a_rounded_percentage() -> None:
    assert task_score([1.0, 0.0, 0.0]) == 33.33
    assert task_score(iter([0.5])) == 50.0


def test_a_benchmark_weighs_its_tasks_equally() -> None:
    tasks = {"ruler/vt/4k": 10.0, "ruler/cwe/4k": 20.0, "ruler/vt/8k": 99.0}
    assert averages({"task": task, "score": score} for task, score in tasks.items()) == {"ruler/4k": 15.0}


@pytest.mark.parametrize(
    ("benchmark", "task", "profile", "prediction", "expected"),
    [
        ("lveval", "cmrc_mixup", "paper", "lamp\n\nQuestion", "lamp\n\nQuestion"),
        ("infinitebench", "longbook_qa_eng", "official", " lamp (Passage 2)", " lamp (Passage 2)"),
        ("infinitebench", "longbook_qa_eng", "paper", " lamp (Passage 2)", "lamp"),
        ("longbench", "hotpotqa", "official", " lamp\nsea", " lamp\nsea"),
        ("longbench", "triviaqa", "official", "\n\nlamp \nsea", "lamp "),
        ("longbench", "triviaqa", "paper", "\n\nlamp \nsea", "lamp "),
        ("longbench", "hotpotqa", "paper", "lamp\n\nAnswer: sea</s>", "lamp"),
        ("longbench", "hotpotqa", "paper", "lamp (Document 1) .assistant", "lamp"),
        ("longbench", "dureader", "paper", "灯塔 问题\uff1a谁", "灯塔"),
        ("longbench", "dureader", "official", "灯塔 问题\uff1a谁", "灯塔 问题\uff1a谁"),
        ("longbench", "hotpotqa", "paper", "灯塔 问题\uff1a谁", "灯塔 问题\uff1a谁"),
    ],
)
def test_what_is_scored_of_a_prediction(
    benchmark: str, task: str, profile: str, prediction: str, expected: str
) -> None:
    assert clean_prediction(prediction, benchmark, task, profile) == expected

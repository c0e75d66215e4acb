"""InfiniteBench's metrics for questions on books (src/compute_scores.py of OpenBMB/InfiniteBench), and their tasks.

The AHN paper's scripts score the same tasks with LongBench's ROUGE-L instead.
"""

from __future__ import annotations

from ahn.evaluation.metrics.f1 import token_f1
from ahn.evaluation.metrics.normalise import normalise_chinese

METRIC_OF_TASK = {
    "official": {"longbook_qa_eng": "ib.f1_en", "longbook_qa_chn": "ib.f1_zh"},
    "paper": {"longbook_qa_eng": "lb.rouge", "longbook_qa_chn": "lb.rouge_zh"},
}


def character_f1(prediction: str, answer: str) -> float:
    """F1 over the characters of the normalised texts (`qa_f1_score_zh`)."""
    return token_f1(list(normalise_chinese(prediction)), list(normalise_chinese(answer)))

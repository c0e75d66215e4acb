"""LongBench's metrics (metrics.py of THUDM/LongBench) and which task uses which (`dataset2metric` in eval.py)."""

import difflib
import re
from collections.abc import Sequence

from ahn.errors import AHNError
from ahn.evaluation.metrics.rouge import rouge_l
from ahn.evaluation.metrics.words import cut

METRIC_OF_TASK = {
    "narrativeqa": "lb.qa_f1",
    "qasper": "lb.qa_f1",
    "multifieldqa_en": "lb.qa_f1",
    "multifieldqa_zh": "lb.qa_f1_zh",
    "hotpotqa": "lb.qa_f1",
    "2wikimqa": "lb.qa_f1",
    "musique": "lb.qa_f1",
    "dureader": "lb.rouge_zh",
    "gov_report": "lb.rouge",
    "qmsum": "lb.rouge",
    "multi_news": "lb.rouge",
    "vcsum": "lb.rouge_zh",
    "trec": "lb.classification",
    "triviaqa": "lb.qa_f1",
    "samsum": "lb.rouge",
    "lsht": "lb.classification",
    "passage_count": "lb.count",
    "passage_retrieval_en": "lb.retrieval",
    "passage_retrieval_zh": "lb.retrieval_zh",
    "lcc": "lb.code_sim",
    "repobench-p": "lb.code_sim",
}

PARAGRAPH, PARAGRAPH_CHINESE = r"Paragraph (\d+)", r"段落(\d+)"
"""What answers of the retrieval tasks look like."""


def rouge_l_chinese(prediction: str, answer: str) -> float:
    """ROUGE-L over jieba's words as they are, punctuation included (`rouge_zh_score`)."""
    return rouge_l(" ".join(cut(prediction)), " ".join(cut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / (how many class names the prediction contains), if the right one is among them (`classification_score`).

    A class name that is part of the right one is not held against it; the benchmark removes those names from the list
    that it walks over, so the name after a removed one is never looked at. Scores depend on that.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        if named[position] in answer and named[position] != answer:
            named.remove(named[position])
        position += 1
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """The share of numbers in the prediction that are the answer (`count_score`)."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """`count`, of the paragraph number in an answer such as "Paragraph 7" (`retrieval_score`)."""
    return count(prediction, _number(answer, PARAGRAPH))


def retrieval_chinese(prediction: str, answer: str) -> float:
    """As `retrieval`, for answers such as "段落7" (`retrieval_zh_score`)."""
    return count(prediction, _number(answer, PARAGRAPH_CHINESE))


def code_similarity(prediction: str, answer: str) -> float:
    """Similarity of the answer to the prediction's first line of code, in hundredths (`code_sim_score`).

    The benchmark uses `fuzz.ratio` of fuzzywuzzy. Without python-Levenshtein, which LongBench does not require, that is
    difflib's ratio.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not code or not answer:
        return float(code == answer)
    return round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100


def _number(answer: str, pattern: str) -> str:
    match = re.search(pattern, answer)
    if match is None:
        raise AHNError(f"The answer {answer!r} names no paragraph: expected one that matches {pattern!r}.")
    return match[1]

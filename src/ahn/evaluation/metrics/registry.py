"""Every metric by name, and the one function that scores a prediction against a sample's answers.

Names are `benchmark.metric`: lv LV-Eval, lb LongBench, ib InfiniteBench, ruler RULER.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation.metrics import longbench, lveval
from ahn.evaluation.metrics.rouge import rouge_l
from ahn.evaluation.metrics.words import chinese_tokens, english_tokens, normalise_chinese, token_f1

PROFILES = ("official", "paper")
METRIC_OF_BOOKS = {
    "official": {"longbook_qa_eng": "ib.f1_en", "longbook_qa_chn": "ib.f1_zh"},
    "paper": {"longbook_qa_eng": "lb.rouge", "longbook_qa_chn": "lb.rouge_zh"},
}
"""InfiniteBench's questions on books; the AHN paper's scripts score them with LongBench's ROUGE-L."""


@dataclass(frozen=True)
class MetricInputs:
    """What a metric may look at besides prediction and answer."""

    keywords: str | None = None  # LV-Eval's `answer_keywords`
    stop_words: frozenset[str] = frozenset()  # the protocol's list of the metric's language
    classes: Sequence[str] = ()  # LongBench's `all_classes`


def _english_f1(prediction: str, answer: str, sample: MetricInputs) -> float:
    return token_f1(english_tokens(prediction), english_tokens(answer))


def _chinese_f1(prediction: str, answer: str, sample: MetricInputs) -> float:
    return token_f1(chinese_tokens(prediction), chinese_tokens(answer))


def _character_f1(prediction: str, answer: str, sample: MetricInputs) -> float:
    """InfiniteBench's over the characters of the normalised texts (`qa_f1_score_zh` in src/compute_scores.py)."""
    return token_f1(list(normalise_chinese(prediction)), list(normalise_chinese(answer)))


def _string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER's share of references that occur in the prediction (scripts/eval/synthetic/constants.py)."""
    found = _found(prediction, references)
    return sum(found) / len(found)


def _string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER's question answering: 1 when any reference occurs in the prediction, else 0."""
    return float(any(_found(prediction, references)))


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    if not references:
        raise AHNError("RULER needs one or more reference strings.")
    text = prediction.lower()
    return [reference.lower() in text for reference in references]


METRICS: dict[str, Callable[[str, str, MetricInputs], float]] = {
    "lv.qa_f1": _english_f1,
    "lv.qa_f1_zh": _chinese_f1,
    "lv.en": lambda text, answer, sample: lveval.keyword_f1(text, answer, sample.keywords, sample.stop_words),
    "lv.zh": lambda text, answer, sample: lveval.keyword_f1_chinese(text, answer, sample.keywords, sample.stop_words),
    "lv.rouge_blk": lambda text, answer, sample: lveval.rouge_without_stop_words(text, answer, sample.stop_words),
    "lb.qa_f1": _english_f1,
    "lb.qa_f1_zh": _chinese_f1,
    "lb.rouge": lambda text, answer, sample: rouge_l(text, answer),
    "lb.rouge_zh": lambda text, answer, sample: longbench.rouge_l_chinese(text, answer),
    "lb.classification": lambda text, answer, sample: longbench.classification(text, answer, sample.classes),
    "lb.count": lambda text, answer, sample: longbench.count(text, answer),
    "lb.retrieval": lambda text, answer, sample: longbench.retrieval(text, answer),
    "lb.retrieval_zh": lambda text, answer, sample: longbench.retrieval_chinese(text, answer),
    "lb.code_sim": lambda text, answer, sample: longbench.code_similarity(text, answer),
    "ib.f1_en": _english_f1,
    "ib.f1_zh": _character_f1,
}
"""Scores in [0, 1] of one prediction against one answer."""
FIRST_ANSWER_ONLY = "lv."
"""LV-Eval's scorer leaves its loop after the first answer; the others take the best of all."""
STOP_WORDS = {"lv.en": "ABANDON_WORDS_EN", "lv.zh": "ABANDON_WORDS_ZH", "lv.rouge_blk": "ABANDON_WORDS_ZH"}
"""Word lists in LV-Eval's protocol, by the metrics that need them."""
OVER_ALL_ANSWERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "ruler.all": _string_match_all,
    "ruler.part": _string_match_part,
}
"""These weigh all references together, so they are no score against one answer."""


def score(
    metric: str,
    prediction: str,
    answers: Sequence[str],
    keywords: str | None = None,
    *,
    protocol: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> float:
    """Score one prediction in [0, 1].

    Args:
        metric: a name in `METRICS` or `OVER_ALL_ANSWERS`.
        answers: the sample's answers. LV-Eval's metrics look at the first one only, the others take the best score of
            all; no answers at all score 0, as in the benchmarks' scorers (RULER's metrics have no such case and raise).
        keywords: LV-Eval's `answer_keywords`.
        protocol: LV-Eval's (`ahn.evaluation.protocol.load_protocol("lveval")`), for its metrics with stop words.
        classes: LongBench's `all_classes`.

    Raises:
        AHNError: the metric is unknown, `answers` is one string, or the protocol with its stop words is missing.
    """
    if isinstance(answers, str):
        raise AHNError(f"Answers must be a list of strings, not the string {answers!r}.")
    if metric in OVER_ALL_ANSWERS:
        return OVER_ALL_ANSWERS[metric](prediction, answers)
    if metric not in METRICS:
        raise AHNError(f"Unknown metric {metric!r}: choose one of {', '.join([*METRICS, *OVER_ALL_ANSWERS])}.")
    sample = MetricInputs(keywords, _stop_words(metric, protocol), classes)
    counted = answers[:1] if metric.startswith(FIRST_ANSWER_ONLY) else answers
    return max((float(METRICS[metric](prediction, answer, sample)) for answer in counted), default=0.0)


def metric_name(benchmark: str, task: str, profile: str, protocol: Mapping[str, Any] | None = None) -> str:
    """The metric of a benchmark's task.

    Args:
        benchmark: "lveval", "longbench" or "infinitebench".
        task: the benchmark's own name, such as "dureader_mixup", "qmsum" or "longbook_qa_eng".
        profile: "official" or "paper"; they differ for InfiniteBench.
        protocol: LV-Eval's, which says what each of its tasks uses.

    Raises:
        AHNError: profile, benchmark or task is unknown, or LV-Eval's protocol is missing.
    """
    if profile not in PROFILES:
        raise AHNError(f"Unknown profile {profile!r}: choose one of {', '.join(PROFILES)}.")
    tables: dict[str, Callable[[], Mapping[str, str]]] = {
        "lveval": lambda: _lveval_metrics(protocol),
        "longbench": lambda: longbench.METRIC_OF_TASK,
        "infinitebench": lambda: METRIC_OF_BOOKS[profile],
    }
    if benchmark not in tables:
        raise AHNError(f"Unknown benchmark {benchmark!r}: choose one of {', '.join(tables)}.")
    table = tables[benchmark]()
    if task not in table:
        raise AHNError(f"{benchmark} has no task {task!r}: choose one of {', '.join(table)}.")
    return table[task]


def _lveval_metrics(protocol: Mapping[str, Any] | None) -> dict[str, str]:
    if protocol is None:
        raise AHNError("The metric of an LV-Eval task is in LV-Eval's protocol: pass it.")
    return {task: lveval.METRIC_OF_FUNCTION[function] for task, function in protocol["DATASET_METRIC"].items()}


def _stop_words(metric: str, protocol: Mapping[str, Any] | None) -> frozenset[str]:
    if metric not in STOP_WORDS:
        return frozenset()
    if protocol is None:
        raise AHNError(f"The metric {metric} needs LV-Eval's protocol, which holds its stop words: pass it.")
    return frozenset(protocol[STOP_WORDS[metric]])

"""The benchmarks' metrics: plain functions on strings, equal to the official code to 1e-9.

Names are `benchmark.metric`: lv LV-Eval, lb LongBench, ib InfiniteBench, ruler RULER.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation.metrics import longbench, lveval
from ahn.evaluation.metrics.rouge import rouge_l
from ahn.evaluation.metrics.words import character_f1, chinese_f1, english_f1


def _string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER's share of references that occur in the prediction (scripts/eval/synthetic/constants.py)."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def _string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER's question answering: 1 when any reference occurs in the prediction, else 0."""
    return float(_string_match_all(prediction, references) > 0)


METRICS: dict[str, Callable[..., float]] = {
    "lv.qa_f1": english_f1,
    "lv.qa_f1_zh": chinese_f1,
    "lv.en": lveval.keyword_f1,
    "lv.zh": lveval.keyword_f1_chinese,
    "lv.rouge_blk": lveval.rouge_without_stop_words,
    "lb.qa_f1": english_f1,
    "lb.qa_f1_zh": chinese_f1,
    "lb.rouge": rouge_l,
    "lb.rouge_zh": longbench.rouge_l_chinese,
    "lb.classification": longbench.classification,
    "lb.count": longbench.count,
    "lb.retrieval": longbench.retrieval,
    "lb.retrieval_zh": longbench.retrieval_chinese,
    "lb.code_sim": longbench.code_similarity,
    "ib.f1_en": english_f1,
    "ib.f1_zh": character_f1,
}
"""Scores in [0, 1] of a prediction against one answer; some take more of the sample, see `score`."""
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
        answers: the sample's. LV-Eval's scorer leaves its loop after the first one, the others take the best score of
            all; none at all score 0.
    """
    if metric in OVER_ALL_ANSWERS:
        return OVER_ALL_ANSWERS[metric](prediction, answers)
    more: list[Any] = [keywords] if metric in ("lv.en", "lv.zh") else []
    if metric in STOP_WORDS:
        if protocol is None:
            raise AHNError(f"The metric {metric} needs LV-Eval's protocol, which holds its stop words: pass it.")
        more.append(frozenset(protocol[STOP_WORDS[metric]]))
    if metric == "lb.classification":
        more.append(classes)
    counted = answers[:1] if metric.startswith("lv.") else answers
    return max((float(METRICS[metric](prediction, answer, *more)) for answer in counted), default=0.0)


def task_score(scores: Iterable[float]) -> float:
    """Mean of the scores of one or more samples in percent, two decimals (`scorer` in LV-Eval and LongBench, RULER's).

    Both profiles use it. InfiniteBench's own script prints the unrounded fraction.
    """
    total, number = 0.0, 0
    for value in scores:  # one by one as the scorers do: sum() rounds otherwise since Python 3.12
        total, number = total + value, number + 1
    return round(100 * total / number, 2)

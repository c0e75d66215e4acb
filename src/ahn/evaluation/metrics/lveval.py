"""LV-Eval's metrics (metrics.py of infinigence/LVEval). The stop words belong to it and come from its protocol."""

from collections.abc import Collection, Sequence

from ahn.evaluation.metrics.rouge import rouge_l
from ahn.evaluation.metrics.words import (
    chinese_tokens,
    cut,
    english_tokens,
    normalise_chinese,
    shared_tokens,
    token_f1,
)

ENGLISH_THRESHOLD = 0.2
CHINESE_THRESHOLD = 0.4

# `DATASET_METRIC` in config.py names these functions of the benchmark.
METRIC_OF_FUNCTION = {
    "qa_f1_score": "lv.qa_f1",
    "qa_f1_zh_score": "lv.qa_f1_zh",
    "qa_f1_score_with_gold_ans": "lv.en",
    "qa_f1_zh_score_with_gold_ans": "lv.zh",
    "rouge_zh_score_blacklist": "lv.rouge_blk",
}


def keyword_f1(prediction: str, answer: str, keywords: str | None, stop_words: Collection[str]) -> float:
    """Word F1, or 0 when fewer than 0.2 of the keywords' words were found (`qa_f1_score_with_gold_ans`).

    Keywords that are missing, empty or only articles and punctuation ask for nothing. (In the last case the benchmark's
    own code divides by zero.)
    """
    predicted = english_tokens(prediction)
    if not _recalled(predicted, english_tokens(keywords or ""), stop_words, ENGLISH_THRESHOLD):
        return 0.0
    return token_f1(predicted, english_tokens(answer))


def keyword_f1_chinese(prediction: str, answer: str, keywords: str | None, stop_words: Collection[str]) -> float:
    """As `keyword_f1` over jieba's words, with 0.4 (`qa_f1_zh_score_with_gold_ans`).

    Missing or empty keywords are replaced by the answer.
    """
    predicted = chinese_tokens(prediction)
    if not _recalled(predicted, chinese_tokens(keywords or answer), stop_words, CHINESE_THRESHOLD):
        return 0.0
    return token_f1(predicted, chinese_tokens(answer))


def rouge_without_stop_words(prediction: str, answer: str, stop_words: Collection[str]) -> float:
    """ROUGE-L over jieba's words, normalised, without stop words (`rouge_zh_score_blacklist`)."""
    return rouge_l(*(" ".join(_cut_twice(text, stop_words)) for text in (prediction, answer)))


def _recalled(predicted: Sequence[str], keywords: Sequence[str], stop_words: Collection[str], threshold: float) -> bool:
    """Whether enough keywords were predicted. Stop words never count as found, but stay in the denominator."""
    return not keywords or shared_tokens(predicted, keywords, stop_words) / len(keywords) >= threshold


def _cut_twice(text: str, stop_words: Collection[str]) -> list[str]:
    """The benchmark cuts the text, joins the words with spaces and cuts that again, which can split them further.

    Tokens left empty by the normalisation stay, as in the benchmark: they decide whether ROUGE sees an empty text.
    """
    tokens = (normalise_chinese(word) for word in cut(" ".join(cut(text))))
    return [token for token in tokens if token not in stop_words]

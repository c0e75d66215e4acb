"""Text to words and characters as the question-answering benchmarks do it, and what two texts share of them.

Source: `normalize_answer`, `normalize_zh_answer` and `f1_score`, which LV-Eval (metrics.py), LongBench (metrics.py) and
InfiniteBench (src/compute_scores.py) share; the English ones are SQuAD's. Chinese words are jieba's at the version of
LV-Eval, because scores depend on its dictionary.
"""

import functools
import logging
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from ahn.errors import AHNError, install_command

JIEBA = "0.42.1"  # LV-Eval's requirements.txt
_ARTICLES = re.compile(r"\b(a|an|the)\b")

# The benchmarks' set, with its gaps: the opening "《" (U+300A) and the full-width full stop (U+FF0E) stay in the text.
_CHINESE_RANGES = (
    (0x2013, 0x2014),  # dashes
    (0x2018, 0x2019),  # curly quotes …
    (0x201B, 0x201F),
    (0x2026, 0x2027),  # ellipsis, hyphenation point
    (0x3001, 0x3003),  # ideographic comma, full stop, ditto mark
    (0x300B, 0x3011),  # brackets …
    (0x3014, 0x301F),
    (0x3030, 0x3030),  # wavy dash
    (0x303E, 0x303F),
    (0xFE4F, 0xFE4F),  # wavy low line
    (0xFF01, 0xFF0D),  # full-width forms of ASCII punctuation …
    (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),  # … and half-width CJK punctuation
)
_DROP_ENGLISH = dict.fromkeys(map(ord, string.punctuation))
_DROP_CHINESE = _DROP_ENGLISH | dict.fromkeys(
    code for first, last in _CHINESE_RANGES for code in range(first, last + 1)
)


@functools.cache
def _segmenter() -> Any:
    try:
        import jieba
    except ImportError as error:
        raise AHNError(f"Chinese scores need jieba: {install_command('eval')}.") from error
    if jieba.__version__ != JIEBA:
        raise AHNError(
            f"Chinese scores are defined with jieba {JIEBA}, but {jieba.__version__} is installed: "
            f"run pip install jieba=={JIEBA}."
        )
    jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr
    return jieba.Tokenizer()  # our own: words that a program adds to jieba's global one must not change scores


def cut(text: str) -> list[str]:
    """The words of a text in order, white space and punctuation included, so that joining them gives the text.

    Raises:
        AHNError: jieba is missing or has another version.
    """
    return list(_segmenter().cut(text, cut_all=False))


def normalise_english(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_ENGLISH)).split())


def normalise_chinese(text: str) -> str:
    """Lower case, without ASCII and Chinese punctuation and without any white space."""
    return "".join(text.lower().translate(_DROP_CHINESE).split())


def english_tokens(text: str) -> list[str]:
    """The normalised words."""
    return normalise_english(text).split()


def chinese_tokens(text: str) -> list[str]:
    """jieba's words of the raw text, each then normalised; those that were only punctuation or space are gone."""
    return [token for word in cut(text) if (token := normalise_chinese(word))]


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


def english_f1(prediction: str, answer: str) -> float:
    """Over the normalised words."""
    return token_f1(english_tokens(prediction), english_tokens(answer))


def chinese_f1(prediction: str, answer: str) -> float:
    """Over jieba's words, normalised."""
    return token_f1(chinese_tokens(prediction), chinese_tokens(answer))


def character_f1(prediction: str, answer: str) -> float:
    """InfiniteBench's over the characters of the normalised texts (`qa_f1_score_zh` in src/compute_scores.py)."""
    return token_f1(normalise_chinese(prediction), normalise_chinese(answer))

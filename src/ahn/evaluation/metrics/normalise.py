"""Text to tokens as the question-answering benchmarks do it.

Source: `normalize_answer` and `normalize_zh_answer`, which LV-Eval (metrics.py), LongBench (metrics.py) and
InfiniteBench (src/compute_scores.py) share; the English one is SQuAD's.
"""

from __future__ import annotations

import re
import string

from ahn.evaluation.metrics.segment import cut

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

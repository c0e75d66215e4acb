"""Metrics against the packages that the benchmarks' own scripts call (lm-eval's extra for LongBench brings them)."""

from __future__ import annotations

import difflib
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahn.evaluation.metrics import score

rouge = pytest.importorskip("rouge")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is slow without python-Levenshtein, whose ratio is another one
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")

PARTS = re.findall(r"\S+", "lamp lamps LAMP 3.14 42 . .. ! 《 。 灯塔 的 港口 Ａ ٣ ß İ 😀 e\u0301 don't # // ` x=1")
GAPS = (" ", "", "\n", "\t", "\u3000", "\xa0", "\u2028", "\x1c")
TEXTS = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(GAPS)), max_size=12).map(
    lambda pairs: "".join(part + gap for part, gap in pairs)
)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_rouge(prediction: str, answer: str) -> None:
    try:
        expected = rouge.Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except ValueError:  # an empty text; the scripts score it 0
        expected = 0.0
    assert score("lb.rouge", prediction, [answer]) == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.skipif(fuzz.SequenceMatcher is not difflib.SequenceMatcher, reason="python-Levenshtein is installed")
@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_code_similarity(line: str, answer: str) -> None:
    """Of a prediction that is one line of code, or a comment before it."""
    line = line.replace("#", "").replace("//", "").replace("`", "").replace("\n", " ")
    assert score("lb.code_sim", f"\n# a comment\n{line}\nmore", [answer]) == fuzz.ratio(line, answer) / 100

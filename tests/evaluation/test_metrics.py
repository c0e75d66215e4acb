"""Metrics against rows of the benchmarks' own code: published rows, and rows with our own texts.

`metric_rows.json` was computed with LV-Eval's metrics.py at the protocol's commit (with the stop words that the file
names), LongBench's and InfiniteBench's functions, rouge 1.0.1, jieba 0.42.1 and fuzzywuzzy 0.18.0.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ahn.errors import AHNError, install_command
from ahn.evaluation.metrics import METRICS, score, words
from ahn.evaluation.metrics.longbench import METRIC_OF_TASK
from ahn.evaluation.metrics.lveval import METRIC_OF_FUNCTION
from ahn.evaluation.metrics.words import chinese_tokens, english_tokens, normalise_chinese
from ahn.evaluation.tasks import infinitebench

OWN = json.loads(Path(__file__).with_name("metric_rows.json").read_text(encoding="utf-8"))
PUBLISHED = json.loads(Path(__file__).with_name("published_rows.json").read_text(encoding="utf-8"))
FORMS = json.loads(Path(__file__).with_name("protocol_forms.json").read_text(encoding="utf-8"))
STOP_WORDS: dict[str, Any] = OWN["stop_words"]
TOLERANCE = 1e-9  # the formulas are the same, so the difference is in fact 0


@pytest.mark.parametrize("row", OWN["rows"], ids=lambda row: f"{row[0]}-{row[1][:12]}")
def test_own_rows(row: list[Any]) -> None:
    metric, prediction, answers, keywords, classes, expected = row
    found = score(metric, prediction, answers, keywords, protocol=STOP_WORDS, classes=classes)
    assert found == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_own_rows_cover_every_metric() -> None:
    assert {row[0] for row in OWN["rows"]} == set(METRICS)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}-{row[1][:12]}")
def test_published_rows(row: list[Any]) -> None:
    metric, prediction, answers, keywords, expected = row
    found = score(metric, prediction, answers, keywords, protocol=FORMS["lveval"])
    assert found == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_lveval_looks_at_the_first_answer_only() -> None:
    answers = ["harbour", "lamp"]
    assert score("lv.qa_f1", "lamp", answers) == 0
    assert score("lb.qa_f1", "lamp", answers) == 1
    assert score("ib.f1_en", "lamp", answers) == 1


def test_keywords_without_words_ask_for_nothing() -> None:
    """The benchmark's own code divides by zero here."""
    assert score("lv.en", "lamp", ["lamp"], "the", protocol=STOP_WORDS) == 1
    assert score("lv.zh", "灯塔", ["灯塔"], "\u3002", protocol=STOP_WORDS) == 1


@pytest.mark.parametrize("metric", ["lv.en", "lv.zh", "lv.rouge_blk"])
def test_stop_words_are_never_forgotten(metric: str) -> None:
    with pytest.raises(AHNError, match="needs LV-Eval's protocol"):
        score(metric, "lamp", ["lamp"], "lamp")


def test_ruler() -> None:
    references = ["Lamp", "harbour", "42"]
    assert score("ruler.all", "the LAMP costs 420", references) == pytest.approx(2 / 3)
    assert score("ruler.part", "the LAMP", references) == 1
    assert score("ruler.part", "", references) == 0


def test_an_answer_that_names_no_paragraph() -> None:
    with pytest.raises(AHNError, match="names no paragraph"):
        score("lb.retrieval", "7", ["7"])


def test_every_task_has_a_metric() -> None:
    named = {*METRIC_OF_FUNCTION.values(), *METRIC_OF_TASK.values()}
    assert named | {*infinitebench.METRICS.values(), *infinitebench.PAPER_METRICS.values()} == set(METRICS)


def test_normalisation_has_the_benchmarks_gaps() -> None:
    assert english_tokens("An apple-a-day, THE end_of “it”") == ["appleaday", "endof", "“it”"]
    assert normalise_chinese("\u300a灯塔\u300b \uff21\uff0e\u2018\u201a\u2019 B.") == "\u300a灯塔\uff41\uff0e\u201ab"
    assert chinese_tokens("灯塔\u3002 \u3000\n") == ["灯塔"]


def test_a_program_that_extends_jiebas_dictionary_changes_no_score() -> None:
    import jieba

    before = words.cut("守灯人照看灯塔")
    jieba.add_word("守灯人照看", freq=10**6)
    assert jieba.lcut("守灯人照看灯塔") != before
    assert words.cut("守灯人照看灯塔") == before


@pytest.fixture
def _fresh_segmenter() -> Any:
    words._segmenter.cache_clear()
    yield
    words._segmenter.cache_clear()


@pytest.mark.usefixtures("_fresh_segmenter")
def test_jieba_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("jieba.__version__", "0.39")
        with pytest.raises(AHNError, match=r"0\.39 is installed: run pip install jieba==0\.42\.1"):
            score("lb.rouge_zh", "灯", ["灯"])
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(AHNError, match=re.escape(install_command("eval"))):
        score("lv.qa_f1_zh", "灯", ["灯"])
    assert score("lv.qa_f1", "lamp", ["lamp"]) == score("ib.f1_zh", "灯", ["灯"]) == 1  # these need no jieba

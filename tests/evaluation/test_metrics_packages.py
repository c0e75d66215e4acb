"""Metrics against the packages that the benchmarks' own scripts call (lm-eval's extra for LongBench brings them).

And where lm-eval's tasks score otherwise than the benchmarks' scripts, which is why ours are there beside them.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahn.evaluation.metrics import score
from ahn.evaluation.metrics.clean import clean_prediction

rouge = pytest.importorskip("rouge")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is slow without python-Levenshtein, whose ratio is another one
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")

PARTS = re.findall(r"\S+", "lamp lamps LAMP 3.14 42 . .. ! 《 。 灯塔 的 港口 Ａ ٣ ß İ 😀 e\u0301 don't # // ` x=1")
GAPS = (" ", "", "\n", "\t", "\u3000", "\xa0", "\u2028", "\x1c")
TEXTS = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(GAPS)), max_size=12).map(
    lambda pairs: "".join(part + gap for part, gap in pairs)
)


@given(TEXTS, TEXTS)
def test_rouge(prediction: str, answer: str) -> None:
    try:
        expected = rouge.Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except ValueError:  # an empty text; the scripts score it 0
        expected = 0.0
    assert score("lb.rouge", prediction, [answer]) == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.skipif(fuzz.SequenceMatcher is not difflib.SequenceMatcher, reason="python-Levenshtein is installed")
@given(TEXTS, TEXTS)
def test_code_similarity(line: str, answer: str) -> None:
    """Of a prediction that is one line of code, or a comment before it."""
    line = line.replace("#", "").replace("//", "").replace("`", "").replace("\n", " ")
    assert score("lb.code_sim", f"\n# a comment\n{line}\nmore", [answer]) == fuzz.ratio(line, answer) / 100


def harness(path: str) -> Any:
    """A module of lm-eval's tasks, which are no package."""
    lm_eval = pytest.importorskip("lm_eval")
    file = Path(lm_eval.__file__).parent / "tasks" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "task", "metric", "prediction", "answers", "ours", "theirs"),
    [
        # Neither strips: white space after the last full stop is a sentence with an empty word.
        ("longbench", "qmsum", "lb.rouge", "a lamp. ", ["a lamp"], 0.8, 1),
        # A line of white space is the first line of code.
        ("longbench", "lcc", "lb.code_sim", " \nx = 1", ["x = 1"], 0.33, 1),
        # It takes the first line after empty ones; the harness stops at the first line's end.
        ("longbench", "triviaqa", "lb.qa_f1", "\nlamp", ["lamp"], 1, 0),
        # All 40 tokens count, for the harness those before a line's end.
        ("infinitebench", "longbook_qa_eng", "ib.f1_en", "sea\nlamp", ["lamp"], 2 / 3, 0),
        # A curly quotation mark is none of the letters.
        ("infinitebench", "longbook_qa_chn", "ib.f1_zh", "\u201c灯塔\u201d", ["灯塔"], 1, 2 / 3),
        # One of the references is enough.
        ("ruler", "qa_1", "ruler.part", "a lamp", ["lamp", "light"], 1, 1 / 2),
    ],
)
def test_where_the_harness_scores_otherwise(
    benchmark: str, task: str, metric: str, prediction: str, answers: list[str], ours: float, theirs: float
) -> None:
    """A case that fails says that lm-eval has come to agree: then its task may take the place of ours."""
    assert score(metric, clean_prediction(prediction, benchmark, task, "official"), answers) == pytest.approx(ours)
    until = prediction.partition("\n")[0] if task == "triviaqa" or benchmark == "infinitebench" else prediction
    if benchmark == "longbench":
        found = getattr(harness("longbench/metrics.py"), f"get_{FUNCTIONS[metric]}")({"answers": answers}, [until])
    elif benchmark == "infinitebench":
        name = "process_results_qa_en" if task.endswith("eng") else "process_results_qa_chn"
        found = getattr(harness("infinitebench/utils.py"), name)({"answer": answers}, [until])
    else:
        document = {"outputs": answers, "max_length": 4096}
        found = harness("ruler/common_utils.py").process_results_part(document, [until])
    assert max(found.values()) == pytest.approx(theirs)


FUNCTIONS = {"lb.rouge": "rouge_score", "lb.code_sim": "code_sim_score", "lb.qa_f1": "qa_f1_score"}

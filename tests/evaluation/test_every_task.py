"""Every task of every benchmark, end to end on a few samples in the official format, with the shipped model.

Data have the benchmarks' fields and file names; prompts are ours. Windows are short, so that the memory
has something to do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_files as files
import pytest
from support import effort

from ahn import tiny
from ahn.evaluation import documents, methods, perplexity, runner
from ahn.evaluation.task import Task
from ahn.evaluation.tasks import infinitebench, longbench, lveval, tasks
from ahn.evaluation.tasks.ruler import TASKS as RULER

LIMIT = 160
"""Tokens of a prompt of the downloaded benchmarks."""
NEW_TOKENS = 3
SAMPLES = effort.examples(1, 2)
ONE_OF_A_KIND = ("niah_single_1", "niah_multikey_1", "vt", "cwe", "fwe")
"""Of RULER's tasks; tests/evaluation/test_ruler.py looks at the prompts of each."""
QUOTED = "港口的灯是蓝色的。米拉带着七封信去磨坊。"


@pytest.fixture(scope="module", params=["ahn", "window", "full"])
def evaluated(request: pytest.FixtureRequest) -> methods.Evaluated:
    adapter = str(tiny.adapter_path("gated_deltanet"))
    return methods.load(request.param, str(tiny.path()), adapter, window=48, sinks=16, device="cpu")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample or two of each task, in its language and with answers of its kind."""
    directory = tmp_path_factory.mktemp("official")
    for name in lveval.TASKS:
        chinese = "_zh" in name or name in ("cmrc_mixup", "lic_mixup", "dureader_mixup")
        changes: dict[str, Any] = {"context": QUOTED, "answers": ["蓝色"]} if chinese else {}
        if name in ("dureader_mixup", "cmrc_mixup"):
            changes["answer_keywords"] = ...  # these have none
        rows = [files.lveval_row(number, dataset=f"{name}_16k", **changes) for number in range(SAMPLES)]
        files.write_lveval(directory, rows, name)
    kinds = {
        "trec": {"all_classes": ["Colour", "Number of something"], "answers": ["Colour"]},
        "lsht": {"all_classes": ["体育", "教育"], "answers": ["教育"]},
        "passage_count": {"answers": ["7"]},
        "passage_retrieval_en": {"answers": ["Paragraph 7"]},
        "passage_retrieval_zh": {"answers": ["段落7"]},
        "lcc": {"answers": ["return first"], "context": "def add(first, second):\n", "input": ""},
    }
    rows = {
        name: [files.longbench_row(number, dataset=name, **kinds.get(name, {})) for number in range(SAMPLES)]
        for name in longbench.TASKS
    }
    files.write_longbench(directory, **{name.replace("-", "_"): row for name, row in rows.items()})
    for name in infinitebench.TASKS:
        files.write_infinitebench(directory, [files.infinitebench_row(number) for number in range(SAMPLES)], name)
    return directory


def run(found: list[Task], evaluated: methods.Evaluated, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of every task, which agree with its result."""
    for task in found:
        task.max_new_tokens = NEW_TOKENS
    results = runner.run(found, evaluated, out)
    assert [result["task"] for result in results] == [task.name for task in found]
    rows = {}
    for task, result in zip(found, results, strict=True):
        (folder,) = out.glob(f"*-{result['digest'][:10]}")
        rows[task.name] = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        samples = list(task.samples())
        assert result["samples"] == len(samples) and result["method"] == evaluated.method
        assert 0 <= result["score"] <= 100
        for row, sample in zip(rows[task.name], samples, strict=True):
            assert (row["id"], row["score"]) == (sample.id, task.score(row["prediction"], sample))
            assert 1 <= row["new_tokens"] <= NEW_TOKENS
    return rows


DOWNLOADED = [
    ("lveval/16k", "official", lveval.TASKS),
    ("longbench", "official", longbench.TASKS),
    ("longbench", "paper", longbench.PAPER_TASKS),
    ("infinitebench", "official", infinitebench.TASKS),
    ("infinitebench", "paper", infinitebench.TASKS),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("spec", "profile", "names"), DOWNLOADED, ids=[f"{s}-{p}" for s, p, _ in DOWNLOADED])
def test_downloaded_benchmarks(
    spec: str,
    profile: str,
    names: tuple[str, ...],
    evaluated: methods.Evaluated,
    data_dir: Path,
    protocol_dir: Path,
    tmp_path: Path,
) -> None:
    found = tasks(spec, profile=profile, data_dir=data_dir, protocol_dir=protocol_dir, max_length=LIMIT)
    assert [task.name.split("/")[1] for task in found] == list(names)
    for name, rows in run(found, evaluated, tmp_path).items():
        for row in rows:
            # Text that was cut can have a few tokens more when it is tokenised again.
            assert row["prompt_tokens"] <= LIMIT + 8, name


@pytest.mark.sample(1)
def test_ruler(evaluated: methods.Evaluated, tmp_path: Path) -> None:
    names = [name for name in RULER if not name.startswith("qa_")] if effort.everything else ONE_OF_A_KIND
    lengths = dict.fromkeys(names, 384) | {"vt": 1024, "cwe": 768}
    found = [
        task
        for name, length in lengths.items()
        for task in tasks(f"ruler/{name}/{length}", tokenizer=evaluated.tokenizer, samples=1)
    ]
    for task in found:
        assert all(row["prompt_tokens"] > 48 + 16 for row in run([task], evaluated, tmp_path)[task.name])


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["number", "fact"])
def test_needles(kind: str, evaluated: methods.Evaluated, tmp_path: Path) -> None:
    options = {"lengths": (256, 384), "depths": (0.0, 50.0, 100.0), "samples": 1}
    found = tasks(f"needle/{kind}", tokenizer=evaluated.tokenizer, **options)
    rows = run(found, evaluated, tmp_path)[f"needle/{kind}"]
    assert [(row["extra"]["length"], row["extra"]["depth"]) for row in rows] == [
        (length, depth) for length in (256, 384) for depth in (0.0, 50.0, 100.0)
    ]


@pytest.mark.slow
def test_perplexity(evaluated: methods.Evaluated, tmp_path: Path) -> None:
    document = documents.tokenised(evaluated.tokenizer, documents.read(), 300)
    figures = perplexity.run(evaluated, document, tmp_path, bucket=100)
    assert figures["tokens"] == 300 and 0 < figures["loss"] < 8  # of 4096 tokens, chance would be 8.3 nats

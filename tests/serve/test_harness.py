"""lm-eval's clients of a served model give the scores that it has in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

from ahn import tiny

pytestmark = pytest.mark.slow
STORY = "The keeper of the lighthouse kept a green lamp in the cellar, and nobody knew why. " * 25
"""Longer than the shipped model's window."""


def tasks(folder: Path) -> list[dict[str, Any]]:
    rows = [{"q": f"{STORY}{who} saw", "choices": [" the lamp", " nobody"], "gold": 0} for who in ("He", "She", "It")]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    shared |= {"doc_to_text": "{{q}}"}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    write = {"output_type": "generate_until", "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}]}
    write |= {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}}
    return [{"task": "choose", **shared, **choice}, {"task": "write", **shared, **write}]


def answers(folder: Path, model: str, names: tuple[str, ...], **options: Any) -> dict[str, list[Any]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from ahn.evaluation.lm_eval import model as _register  # noqa: F401

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task for task in tasks(folder) if task["task"] in names],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return {name: [row["resps"] for row in found["samples"][name]] for name in names}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def test_scores_are_those_of_this_process(live: Any, tmp_path: Path) -> None:
    ours = {"pretrained": str(tiny.path()), "adapter": str(tiny.adapter_path("gated_deltanet"))}
    expected = answers(tmp_path, "ahn", ("choose", "write"), model_args=ours, device="cpu")
    served = {"model": "tiny", "tokenizer": str(tiny.path()), "max_length": 100_000}
    found = answers(
        tmp_path,
        "local-completions",
        ("choose", "write"),
        model_args={"base_url": f"{live.url}/v1/completions", "tokenizer_backend": "huggingface", **served},
        batch_size=3,
    )
    assert found["write"] == expected["write"]
    for alone, together in zip(expected["choose"], found["choose"], strict=True):
        assert [pair[0][0] for pair in together] == pytest.approx([pair[0][0] for pair in alone], rel=1e-4)
        assert [pair[0][1] for pair in together] == [pair[0][1] for pair in alone]  # greedy or not
    chat = answers(
        tmp_path,
        "local-chat-completions",
        ("write",),
        model_args={"base_url": f"{live.url}/v1/chat/completions", **served},
        apply_chat_template=True,
    )
    assert chat["write"] == expected["write"]

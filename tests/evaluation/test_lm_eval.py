"""The harness with our models: the base model's own numbers while nothing leaves the window, and ours beyond it.

Most of this needs lm-eval, which is an extra of its own (`pip install 'ahn[lm-eval]'`), and is skipped without it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark_files as files
import pytest

from ahn import tiny
from ahn.errors import install_command
from ahn.evaluation import lm_eval as ours
from ahn.evaluation.tasks import lveval

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

SHORT = "The lamp was"
LONG = 2 * files.STORY
"""Within the tiny model's window of 48 + 8 bytes, and beyond."""


def test_without_lm_eval_the_program_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stopped:
        ours.main()
    assert stopped.value.code == 1
    assert install_command("lm-eval") in capsys.readouterr().err


def test_every_task_of_lveval_is_described(tmp_path: Path) -> None:
    ours.write_tasks(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(lveval.names()) == 55
    text = (tmp_path / "lveval_factrecall_en_16k.yaml").read_text()
    assert text.splitlines()[0] == "task: lveval_factrecall_en_16k" and "tag: [lveval, lveval_16k]" in text


def tasks(folder: Path, text: str) -> list[dict[str, Any]]:
    """A multiple choice and a generation of a few questions that begin with a text."""
    rows = [{"q": f"{text} {colour}", "choices": ["and red", "or"], "gold": 0} for colour in ("blue", "old", "wet")]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    shared |= {"doc_to_text": "{{q}}"}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    write = {"output_type": "generate_until", "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}]}
    write |= {"generation_kwargs": {"until": [], "max_gen_toks": 6, "do_sample": False}}
    return [{"task": "choose", **shared, **choice}, {"task": "write", **shared, **write}]


def answers(folder: Path, text: str, model: str, batch_size: int = 1, **arguments: Any) -> list[Any]:
    """What a model said to each request: log likelihoods as they are, and texts."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from ahn.evaluation.lm_eval import model as _register  # noqa: F401

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks(folder, text),
        task_manager=TaskManager(include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )
    return [row["resps"] for task in ("choose", "write") for row in found["samples"][task]]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    if importlib.util.find_spec("lm_eval"):
        # The harness describes the machine in its results, with a dozen programs that take longer than these tasks.
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.mark.sample(1)
@needs_lm_eval
@pytest.mark.parametrize("method", ["ahn", "window", "full", "ct-avg"])
def test_short_tasks_have_exactly_the_base_models_scores(method: str, tiny: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = tiny
    expected = answers(tmp_path, SHORT, "hf", pretrained=base, dtype="float32")
    assert answers(tmp_path, SHORT, "ahn", pretrained=base, adapter=adapter, method=method) == expected
    assert len(expected) == 6


@pytest.mark.slow
@needs_lm_eval
def test_long_prompts_are_remembered_or_not(tiny: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = tiny
    given = {"pretrained": base, "adapter": adapter}
    found = {method: answers(tmp_path, LONG, "ahn", method=method, **given) for method in ("ahn", "window", "full")}
    assert found["full"] == answers(tmp_path, LONG, "hf", pretrained=base, dtype="float32")
    assert found["ahn"] != found["window"] != found["full"] != found["ahn"]
    # A batch is padded; its rows say what they say alone, to float tolerance.
    batched = answers(tmp_path, LONG, "ahn", 3, **given)
    for alone, together in zip(found["ahn"], batched, strict=True):
        if isinstance(alone[0][0], str):
            assert alone == together
        else:
            assert [pair[0][0] for pair in together] == pytest.approx([pair[0][0] for pair in alone], rel=1e-4)


@needs_lm_eval
def test_prompts_lose_their_beginning_at_max_length(tiny: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = tiny
    given = {"pretrained": base, "adapter": adapter, "method": "full", "max_length": 40}
    other = LONG[:100].swapcase() + LONG[100:]
    assert answers(tmp_path, LONG, "ahn", **given) == answers(tmp_path, other, "ahn", **given)
    given["max_length"] = 1000
    assert answers(tmp_path, LONG, "ahn", **given) != answers(tmp_path, other, "ahn", **given)


@needs_lm_eval
def test_the_length_limit_is_the_memorys_not_the_base_models(tiny: tuple[str, str]) -> None:
    from ahn.evaluation.lm_eval.model import AHNLM, UNLIMITED

    base, adapter = tiny
    limits = {method: AHNLM(base, adapter, method, device="cpu").max_length for method in ("ahn", "window", "full")}
    assert limits == {"ahn": UNLIMITED, "window": UNLIMITED, "full": 4096}  # max_position_embeddings
    told = AHNLM(base, adapter, window=20, sinks=4, max_length=77, device="cpu")
    assert told.max_length == 77
    settings = told.get_model_info()["ahn"]
    assert (settings["method"], settings["window"], settings["sinks"]) == ("ahn", 20, 4)
    assert settings["adapter"] == adapter


@needs_lm_eval
def test_lveval_scores_as_ahn_eval_does(tiny: tuple[str, str], protocol_dir: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from ahn.evaluation import methods, runner
    from ahn.evaluation.lm_eval import model as _register  # noqa: F401
    from ahn.evaluation.tasks import tasks as find

    base, adapter = tiny
    (tmp_path / "tasks").mkdir()
    ours.write_tasks(tmp_path / "tasks")
    data = files.write_lveval(tmp_path, [files.lveval_row(n, context=f"{n} {LONG}") for n in range(3)])
    options = {"data_dir": str(data), "protocol_dir": str(protocol_dir)}
    found = lm_eval.simple_evaluate(
        model="ahn",
        model_args={"pretrained": base, "adapter": adapter},
        tasks=["lveval_hotpotwikiqa_mixup_16k"],
        task_manager=TaskManager(
            include_path=tmp_path / "tasks", include_defaults=False, metadata=options | {"pretrained": base}
        ),
        apply_chat_template=True,
        device="cpu",
        bootstrap_iters=0,
    )
    directories = {name: Path(path) for name, path in options.items()}
    evaluated = methods.load("ahn", base, adapter, device="cpu")
    (result,) = runner.run(find("lveval/hotpotwikiqa_mixup/16k", **directories), evaluated, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    samples = found["samples"]["lveval_hotpotwikiqa_mixup_16k"]
    assert [sample["resps"][0][0] for sample in samples] == [row["prediction"] for row in rows]
    assert [sample["score"] for sample in samples] == [row["score"] for row in rows]
    score = found["results"]["lveval_hotpotwikiqa_mixup_16k"]["score,none"]
    assert 100 * score == pytest.approx(result["score"], abs=0.005)  # `ahn eval` rounds to two decimals


def built_in(folder: str, name: str, **metadata: Any) -> Any:
    """A task that the harness ships, as its command line finds it (which first looks at all others)."""
    from lm_eval import tasks

    path = Path(tasks.__file__).parent / folder
    manager = tasks.TaskManager(include_path=str(path), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def responses(task: Any, model: str, **arguments: Any) -> tuple[list[str], dict[str, float]]:
    """What a model wrote, and the task's figures."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from ahn.evaluation.lm_eval import model as _register  # noqa: F401

    how: dict[str, Any] = {"device": "cpu", "limit": 2, "bootstrap_iters": 0, "gen_kwargs": "max_gen_toks=4"}
    how["task_manager"] = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=[task], **how)
    ((name, samples),) = found["samples"].items()
    figures = {key: value for key, value in found["results"][name].items() if key.endswith(",none")}
    return [sample["resps"][0][0] for sample in samples], figures


def check_built_in(task: Any) -> None:
    """With the shipped model: full attention writes what the harness's own class does; memory and window run, too."""
    shipped = {"pretrained": str(tiny.path()), "adapter": str(tiny.adapter_path("gated_deltanet"))}
    texts, figures = responses(task, "hf", pretrained=shipped["pretrained"], dtype="float32")
    assert responses(task, "ahn", method="full", **shipped) == (texts, figures)
    for method in ("ahn", "window"):
        found, scores = responses(task, "ahn", method=method, window=48, sinks=16, **shipped)
        assert len(found) == len(texts) == 2 and scores.keys() == figures.keys()
    # All fits into 2048 tokens: nothing is forgotten, and nothing may differ.
    assert responses(task, "ahn", method="ahn", window=2048, sinks=16, **shipped) == (texts, figures)


@pytest.mark.slow
@needs_lm_eval
def test_the_harness_own_ruler(monkeypatch: pytest.MonkeyPatch) -> None:
    # When it is imported it sorts millions of pairs of words. One will do for a needle.
    words = SimpleNamespace(_categories=dict.fromkeys(("nouns", "adjectives", "verbs"), ("lamp",)))
    monkeypatch.setattr("wonderwords.RandomWord", lambda: words)
    check_built_in(built_in("ruler", "niah_single_1", pretrained=str(tiny.path()), max_seq_lengths=[320]))


@pytest.mark.slow
@needs_lm_eval
def test_the_harness_own_longbench(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [files.longbench_row(number, context=2 * files.STORY) for number in range(2)]
    local = datasets.Dataset.from_list([row | {"question": row["input"]} for row in rows])
    asked = []

    def load(path: str, name: str, **options: Any) -> Any:
        asked.append((path, name))
        return datasets.DatasetDict(test=local)

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load)  # in place of the Hub
    task = built_in("longbench", "longbench_hotpotqa")
    assert asked == [("Xnhyacinth/LongBench", "hotpotqa")]
    check_built_in(task)

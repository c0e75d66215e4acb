"""`ahn eval`: tasks by name, results as a table and as JSON, several processes, and mistakes in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from evaluation import benchmark_files as files


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny model, data and protocols."""
    directory = tmp_path_factory.mktemp("eval")
    base, adapter = files.write_model(directory)
    rows = [files.longbench_row(number, context=f"a b {number}") for number in range(3)]
    files.write_longbench(directory, hotpotqa=rows, musique=rows)
    protocols = files.protocols(directory / "protocols")
    places = ["--data-dir", directory, "--protocol-dir", protocols, "--device", "cpu"]
    return [str(part) for part in ("--model", base, "--adapter", adapter, "--window", 20, "--sinks", 4, *places)]


def test_tasks_as_json_and_as_a_table(ahn_cli: Any, given: list[str], tmp_path: Path) -> None:
    command = ["eval", "longbench/hotpotqa", "longbench/musique", *given, "--out", tmp_path / "out", "--limit", 2]
    result = ahn_cli(*command, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    tasks = [each["task"] for each in found["results"]]
    assert tasks == ["longbench/hotpotqa", "longbench/musique"]
    assert [each["samples"] for each in found["results"]] == [2, 2]
    assert found["averages"] == {"longbench": sum(each["score"] for each in found["results"]) / 2}
    assert len([*(tmp_path / "out").iterdir()]) == 2
    table = ahn_cli(*command)  # all done: only printed again
    assert table.code == 0
    for part in (*tasks, "mean of longbench", "official", "ahn"):
        assert part in table.out
    assert "quantized" not in table.out
    with_codes = ahn_cli(*command, "--quantized", 8)
    assert "quantized" in with_codes.out and "8" in with_codes.out, with_codes.err
    assert len([*(tmp_path / "out").iterdir()]) == 4, "other results, not the same ones"
    assert str(tmp_path / "out").replace("\n", "") in table.err.replace("\n", "")


def test_the_verb_run_may_be_named_and_options_may_come_first(ahn_cli: Any, given: list[str], tmp_path: Path) -> None:
    options = [*given, "--out", tmp_path, "--limit", 1, "--json", "--method", "window", "--profile", "paper"]
    results = [
        ahn_cli("eval", "run", "longbench/hotpotqa", *options),
        ahn_cli("eval", *options, "longbench/hotpotqa", "longbench/hotpotqa"),
    ]
    assert [result.code for result in results] == [0, 0]
    assert results[0].out == results[1].out
    (found,) = json.loads(results[0].out)["results"]
    assert (found["method"], found["profile"], found["memory"]) == ("window", "paper", "window_only")


def test_another_process_than_the_first_says_nothing(
    ahn_cli: Any, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = ahn_cli("eval", "longbench/hotpotqa", *given, "--out", tmp_path)
    assert (result.code, result.out) == (0, "")
    ((folder),) = tmp_path.iterdir()
    assert len((folder / "predictions.1.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["longbench/qmsun"], "There is no task 'longbench/qmsun'; `ahn eval list` names all there are."),
        (["longbunch"], "There is no benchmark 'longbunch'; choose one of lveval, infinitebench"),
        (["longbench", "--profile", "mine"], "Unknown profile 'mine'; choose one of official, paper."),
        (["longbench", "--method", "mine"], "Unknown method 'mine'; choose one of ahn, window"),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(arguments: list[str], message: str, ahn_cli: Any) -> None:
    result = ahn_cli("eval", *arguments, "--model", "/nowhere")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"ahn: {message}")
    assert len(result.err.splitlines()) == 1


def test_bad_data_are_one_sentence(ahn_cli: Any, given: list[str], tmp_path: Path) -> None:
    files.write_longbench(tmp_path, hotpotqa=[files.longbench_row(0), files.longbench_row(1, answers=[])])
    result = ahn_cli("eval", "longbench/hotpotqa", *given, "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert result.code == 1
    wanted = f"{tmp_path}/data.zip (data/hotpotqa.jsonl), line 2: the field 'answers' must not be empty."
    assert result.err.splitlines()[-1] == f"ahn: {wanted}"


def test_list(ahn_cli: Any) -> None:
    names = ahn_cli("eval", "list").out.split()
    assert {"lveval/cmrc_mixup/256k", "infinitebench/zh_qa", "longbench/repobench-p"} < set(names)
    assert any(name.startswith("ruler/") for name in names)
    assert json.loads(ahn_cli("eval", "list", "--json").out) == names


def test_report_is_handed_its_folders(ahn_cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    module = ModuleType("ahn.evaluation.report")
    module.write_report = lambda *arguments: asked.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ahn.evaluation.report", module)
    assert ahn_cli("eval", "report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "r").code == 0
    assert asked == [([tmp_path / "a", tmp_path / "b"], tmp_path / "r")]


def test_perplexity(ahn_cli: Any, given: list[str], tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(3 * files.STORY)
    named = given[: given.index("--data-dir")]
    result = ahn_cli(
        "eval", "perplexity", *named, "--device", "cpu", "--text", text, "--length", 200, "--out", tmp_path, "--json"
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["task"], found["method"], found["tokens"]) == ("perplexity", "ahn", 200)
    assert found["loss"] > 0


def test_gradients(ahn_cli: Any, given: list[str], tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(3 * files.STORY)
    named = [*given[: given.index("--data-dir")], "--device", "cpu", "--text", text, "--out", tmp_path]
    result = ahn_cli("eval", "gradients", *named, "--length", 100, "--answer", 10, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    # Of 100 tokens the one at 89 reads first, and sees from 89 - window + 1 on.
    assert (found["task"], found["remembered"]) == ("gradients", 90 - found["window"] - found["sinks"])
    result = ahn_cli("eval", "gradients", *named, "--length", 30, "--answer", 10)
    assert result.code == 1 and "give a longer text" in result.err


def test_help_names_the_verbs(ahn_cli: Any) -> None:
    text = ahn_cli("eval", "--help").out
    assert all(verb in text for verb in ("run", "perplexity", "gradients", "list", "report"))
    assert "--method" in ahn_cli("eval", "run", "--help").out

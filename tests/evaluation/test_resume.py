"""A run that is killed goes on: no sample is lost, none is repeated, and the result is that of an uninterrupted run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_files as files
import pytest

from ahn.errors import AHNError
from ahn.evaluation import methods, runner
from ahn.evaluation.reader import Reader
from ahn.evaluation.results import ResultFolder, Shard
from ahn.evaluation.task import Task
from ahn.evaluation.tasks import tasks

SETTINGS = {"task": "toy", "profile": "official", "model": "m", "method": "full"}


@pytest.fixture
def task(tmp_path: Path, protocol_dir: Path) -> Task:
    """Six questions on two books, of a few tokens each."""
    rows = [files.infinitebench_row(number, book=files.STORY[: 60 + number % 2]) for number in range(6)]
    files.write_infinitebench(tmp_path, rows)
    return tasks("infinitebench/en_qa", data_dir=tmp_path, protocol_dir=protocol_dir)[0]


@pytest.fixture(scope="module")
def evaluated(tiny: tuple[str, str]) -> methods.Evaluated:
    return methods.load("ahn", *tiny, window=20, sinks=4, device="cpu")


def outcome(out: Path) -> dict[str, bytes]:
    """What a run leaves, but for its times."""
    (folder,) = out.iterdir()
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith("timing")}


class Asked(Reader):
    """Notes which samples are answered."""

    numbers: list[int] = []  # noqa: RUF012  (of one test at a time)

    def answers(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, answer in super().answers(*args, **kwargs):
            self.numbers.append(number)
            yield number, answer


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from ahn.evaluation import methods, runner
from ahn.evaluation.tasks import tasks
torch.set_num_threads(1)
base, adapter, data, protocols, out = sys.argv[1:]

class Killer(runner.Watcher):
    done = 0
    def answered(self):
        self.done += 1
        if self.done == 4:
            os.kill(os.getpid(), signal.SIGKILL)

found = tasks("infinitebench/en_qa", data_dir=Path(data), protocol_dir=Path(protocols))
evaluated = methods.load("ahn", base, adapter, window=20, sinks=4, device="cpu")
runner.run(found, evaluated, Path(out), watcher=Killer())
"""


@pytest.mark.slow
def test_kill_and_the_same_command_again(
    task: Task,
    evaluated: methods.Evaluated,
    tiny: tuple[str, str],
    protocol_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runner.run([task], evaluated, whole)
    arguments = [*tiny, str(tmp_path), str(protocol_dir), str(killed)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = killed.iterdir()
    shard = folder / "predictions.0.jsonl"
    assert len(shard.read_text().splitlines()) == 4
    assert not (folder / "result.json").exists()
    # A kill in the middle of a write leaves a torn line, here the fifth.
    with shard.open("a") as stream:
        stream.write('{"index": 4, "id": "3", "predic')
    monkeypatch.setattr(runner, "Reader", Asked)
    Asked.numbers = []
    runner.run([task], evaluated, killed)
    assert sorted(Asked.numbers) == [4, 5]
    assert outcome(killed) == outcome(whole)


def test_every_place_where_a_line_can_be_torn(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS, {})
    folder.open()
    rows = [{"index": 0, "prediction": "灯塔"}, {"index": 1, "prediction": "a\nb"}]
    with Shard(folder, 0) as shard:
        for row in rows:
            shard.append(row, {})
    file = folder.path / "predictions.0.jsonl"
    content = file.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(len(content)):
        file.write_bytes(content[:size])
        kept = (size >= first) + (size == len(content))
        assert list(folder.rows().values()) == rows[:kept]
        with Shard(folder, 0) as shard:
            for row in rows[kept:]:
                shard.append(row, {})
        assert file.read_bytes() == content


def test_rows_of_all_processes_count_and_the_merged_file_is_in_order(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS, {})
    folder.open()
    for rank, indices in ((0, [4, 0]), (1, [1, 3]), (7, [2])):
        with Shard(folder, rank) as shard:
            for index in indices:
                shard.append({"index": index}, {})
    rows = folder.rows()
    assert sorted(rows) == list(range(5))
    folder.finish([rows[index] for index in sorted(rows)], {"score": 1.0})
    assert [*folder.path.glob("predictions*")] == [folder.path / "predictions.jsonl"]
    lines = (folder.path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(5))
    assert sorted(folder.rows()) == list(range(5))


def test_two_runs_at_once_are_told_apart(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS, {})
    folder.open()
    with Shard(folder, 0), pytest.raises(AHNError, match=r"Another process is writing .*predictions\.0\.jsonl"):
        Shard(folder, 0).__enter__()
    with Shard(folder, 0):
        pass


def test_a_damaged_line_amid_others_is_named(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS, {})
    folder.open()
    (folder.path / "predictions.0.jsonl").write_text('{"index": 0}\n{"ind\n{"index": 2}\n')
    with pytest.raises(AHNError, match=r"predictions\.0\.jsonl, line 2 is damaged"):
        folder.rows()


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS, {})
    folder.open()
    folder.open()
    (folder.path / "config.json").write_text('{"digest": "other"}')
    with pytest.raises(AHNError, match="holds the results of another configuration"):
        folder.open()
    (folder.path / "config.json").write_text("{")
    with pytest.raises(AHNError, match="cannot be read as JSON"):
        folder.open()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(AHNError, match="cannot be used for results"):
        ResultFolder(file, SETTINGS, {}).open()


def test_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, SETTINGS, {})
    folder.open()
    with Shard(folder, 0) as shard:
        shard.append({"index": 0, "prediction": "a\ud800b"}, {})
    assert folder.rows()[0]["prediction"] == "a?b"

"""Samples spread over processes, as `accelerate launch` starts them: the same results as of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import benchmark_files as files
import pytest
import torch

from ahn.errors import AHNError
from ahn.evaluation import methods, runner
from ahn.evaluation.runner import Job
from ahn.evaluation.task import Task
from ahn.evaluation.tasks import tasks
from ahn.evaluation.workers import Worker

SPECS = ("infinitebench/en_qa", "longbench/hotpotqa")


@pytest.fixture
def found(tmp_path: Path, protocol_dir: Path) -> list[Task]:
    """Two tasks of some short samples; the first has questions that share a book."""
    rows = [files.infinitebench_row(number, book=files.STORY[: 50 + number // 2]) for number in range(7)]
    files.write_infinitebench(tmp_path, rows)
    files.write_longbench(tmp_path, hotpotqa=[files.longbench_row(number, context="a b") for number in range(3)])
    return [task for spec in SPECS for task in tasks(spec, data_dir=tmp_path, protocol_dir=protocol_dir)]


@pytest.fixture(scope="module")
def evaluated(tiny: tuple[str, str]) -> methods.Evaluated:
    return methods.load("ahn", *tiny, window=20, sinks=4, device="cpu")


def outcome(out: Path) -> dict[str, bytes]:
    """What runs leave, but for their times."""
    every = (file for file in out.rglob("*") if file.is_file() and not file.name.startswith("timing"))
    return {str(file.relative_to(out)): file.read_bytes() for file in every}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_workers_gives_the_same(
    count: int, found: list[Task], evaluated: methods.Evaluated, tmp_path: Path
) -> None:
    one = runner.run(found, evaluated, tmp_path / "one", worker=Worker())
    for rank in range(1, count):
        assert runner.run(found, evaluated, tmp_path / "many", worker=Worker(rank, count)) == []
    assert not [*(tmp_path / "many").glob("*/result.json")]
    assert runner.run(found, evaluated, tmp_path / "many", worker=Worker(0, count)) == one
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")


def test_the_first_worker_waits_for_the_others(
    found: list[Task], evaluated: methods.Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = runner.run(found, evaluated, tmp_path / "one", worker=Worker())
    late = iter([Worker(2, 3), Worker(1, 3)])
    monkeypatch.setattr(runner.time, "sleep", lambda _: runner.run(found, evaluated, tmp_path / "m", worker=next(late)))
    assert runner.run(found, evaluated, tmp_path / "m", worker=Worker(0, 3)) == one
    assert outcome(tmp_path / "m") == outcome(tmp_path / "one")


def test_another_number_of_workers_goes_on_where_the_first_stopped(
    found: list[Task], evaluated: methods.Evaluated, tmp_path: Path
) -> None:
    one = runner.run(found, evaluated, tmp_path / "one", worker=Worker())
    runner.run(found, evaluated, tmp_path / "many", worker=Worker(2, 3))
    assert runner.run(found, evaluated, tmp_path / "many", worker=Worker()) == one
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")


def test_every_group_has_one_worker(found: list[Task]) -> None:
    job = Job(found[0], None, runner.plan(found[0], None))  # type: ignore[arg-type]
    assert job.groups == ((0, 1), (2, 3), (4, 5), (6,))
    shares = [job.share(Worker(rank, 3)) for rank in range(3)]
    assert shares == [{0, 1, 6}, {2, 3}, {4, 5}]


@pytest.mark.slow
def test_two_processes_of_the_launcher(
    found: list[Task], evaluated: methods.Evaluated, tiny: tuple[str, str], protocol_dir: Path, tmp_path: Path
) -> None:
    """As the documentation has it, by the programs themselves; only the port is one that no other test uses."""
    scripts = Path(sysconfig.get_path("scripts"))
    launcher = [scripts / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0]
    program = [scripts / "ahn", "eval", *SPECS, "--model", tiny[0], "--adapter", tiny[1], "--window", 20, "--sinks", 4]
    places = ["--data-dir", tmp_path, "--protocol-dir", protocol_dir, "--out", tmp_path / "two", "--device", "cpu"]
    done = subprocess.run(
        [str(part) for part in (*launcher, *program, *places, "--json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one = runner.run(found, evaluated, tmp_path / "one", worker=Worker())
    assert json.loads(done.stdout)["results"] == one
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    # Both had a part: two books each of the first task's four.
    (books,) = (tmp_path / "two").glob("infinitebench*")
    assert [len((books / f"timing.{rank}.jsonl").read_text().splitlines()) for rank in range(2)] == [4, 3]


# -- which process this is -----------------------------------------------------------------------------------------


def test_a_launcher_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Worker.from_environment() == Worker(0, 1, 0)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Worker.from_environment() == Worker(9, 16, 1)
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(AHNError, match="RANK is 9 of WORLD_SIZE 9"):
        Worker.from_environment()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(AHNError, match="must be whole numbers"):
        Worker.from_environment()


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [Worker(rank, 16, rank % 8).device() for rank in (0, 7, 8)] == ["cuda:0", "cuda:7", "cuda:0"]
    assert Worker().device() is None  # as without a launcher: whatever is the fastest
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Worker(1, 2, 1).device() is None

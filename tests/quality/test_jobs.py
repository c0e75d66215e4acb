"""Jobs shared among processes: order, failures, crashes and time."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

from stages import jobs
from stages.jobs import Job, Prefixed, do

PLACE = "JOBS_TEST_FOLDER"


def start(device: str) -> Callable[[Any], None]:
    """In a process: writes down when each job began and ended, and where."""
    folder = Path(os.environ[PLACE])

    def work(order: tuple[str, float | str]) -> None:
        name, what = order
        print(f"{name} on {device}")
        (folder / f"{name}.began").write_text(f"{time.time()} {device} {os.getpid()}")
        if what == "raise":
            raise ValueError("it is broken")
        if what == "crash":
            os._exit(7)
        time.sleep(float(what))
        (folder / f"{name}.ended").write_text(str(time.time()))

    return work


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PLACE, str(tmp_path))
    return tmp_path


def job(name: str, what: float | str = 0.0, *needs: str, turn: str | None = None) -> Job:
    return Job(name, (name, what), needs, turn)


def test_failures_stop_nothing_but_what_needs_them(folder: Path, capfd: pytest.CaptureFixture) -> None:
    todo = [
        job("second", 0.0, "first", "alone"),  # listed before what it needs
        job("raises", "raise"),
        job("crashes", "crash"),
        job("third", 0.0, "first", "raises"),
        job("fourth", 0.0, "third"),
        job("first", 0.3),
        job("alone"),
    ]
    assert sorted(do(todo, start, ["cpu", "other"])) == ["crashes", "fourth", "raises", "third"]
    ended = {path.stem for path in folder.glob("*.ended")}
    assert ended == {"first", "second", "alone"}
    assert not (folder / "third.began").exists()
    began = {path.stem: path.read_text().split() for path in folder.glob("*.began")}
    assert float(began["second"][0]) >= float((folder / "first.ended").read_text())
    assert {device for _, device, _ in began.values()} == {"cpu", "other"}
    out, err = capfd.readouterr()
    assert f"first: first on {began['first'][1]}\n" in out
    assert "raises: ValueError: it is broken\n" in err and "FAILED" in out and "third is left out" in out


def test_a_process_does_many_jobs(folder: Path) -> None:
    assert do([job(name) for name in "abc"], start, ["cpu"]) == []
    processes = {path.read_text().split()[2] for path in folder.glob("*.began")}
    assert len(processes) == 1 and str(os.getpid()) not in processes


def test_jobs_of_a_turn_wait_for_each_other(folder: Path) -> None:
    todo = [job("a", 0.3, turn="training"), job("b", 0.0, turn="training"), job("c")]
    assert do(todo, start, ["cpu", "other"]) == []
    began = {path.stem: float(path.read_text().split()[0]) for path in folder.glob("*.began")}
    ended = {path.stem: float(path.read_text()) for path in folder.glob("*.ended")}
    assert began["b"] >= ended["a"] and began["c"] < ended["a"]


def test_nothing_is_begun_when_time_is_over(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert do([job("a", 0.5), job("b")], start, ["cpu"], until=0.2) == []
    assert (folder / "a.ended").exists() and not (folder / "b.began").exists()
    assert "not begun: b" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_processes_end_with_the_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[BaseException]
) -> None:
    def interrupted(_: Any) -> None:
        while not (folder / "long.began").exists():
            time.sleep(0.05)
        signal.raise_signal(number)

    monkeypatch.setattr(jobs, "wait", interrupted)
    with pytest.raises(raised):
        do([job("long", 600.0)], start, ["cpu"])
    process = int((folder / "long.began").read_text().split()[2])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_every_line_has_its_name() -> None:
    class Stream:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    stream = Stream()
    named = Prefixed(stream)  # type: ignore[arg-type]
    named.prefix = "a.1"
    for part in ("one", " line\ntwo", "\n\n", "three"):
        named.write(part)
    assert stream.text == "a.1: one line\na.1: two\na.1: \n"
    named.prefix = "b"
    named.write("\n")
    assert stream.text.endswith("b: three\n")

"""Rows are on disk when they are measured; what fails is a row too."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ahn.bench import runner
from ahn.bench.methods import make_methods
from ahn.bench.records import FILE, Log, read
from ahn.bench.runner import Plan
from ahn.bench.stand import Skipped, Stand
from ahn.errors import AHNError

SHARED = {"model": "small", "device": "cpu", "dtype": "float32"}


def run(stand: Stand, folder: Path, measure: Any, monkeypatch: pytest.MonkeyPatch, batches: list[int]) -> list[Any]:
    monkeypatch.setitem(runner.MEASUREMENTS, "decode", measure)
    plan = Plan("decode", make_methods(["window", "mamba2"], 20, 4), [50], batches)
    said: list[Any] = []
    runner.run(stand, plan, SHARED, Log(folder, {"facts": 1}), said.append)
    assert said == [{name: row[name] for name in row if name not in ("kind", "run", "date")} for row in read(folder)]
    return said


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "out of memory"),
        (Skipped("takes at least 9 s"), "skipped"),
        (AHNError("no parameters"), "unsupported"),
        (ValueError("something else"), "failed"),
    ],
)
def test_what_fails_is_a_row(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def measure(stand: Stand, method: Any, context: int, batch: int) -> dict[str, Any]:
        if batch == 2:
            raise error
        return {"seconds": 1.0}

    rows = run(stand, tmp_path, measure, monkeypatch, [1, 2, 4])
    goes_on = [] if status == "out of memory" else ["ok"]  # more conversations need more
    assert [row["status"] for row in rows] == ["ok", status, *goes_on] * 2
    assert str(error) in rows[1]["why"]
    assert ("traceback" in rows[1]) == (status == "failed")


def test_refused_models_are_a_row(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AHNError("latent attention is not supported")

    monkeypatch.setattr("ahn.measure.method.attach", refuse)
    rows = run(stand, tmp_path, lambda *_: {}, monkeypatch, [1])
    assert [row["status"] for row in rows] == ["unsupported"] * 2


def test_an_interrupt_leaves_what_was_measured(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(stand: Stand, method: Any, context: int, batch: int) -> dict[str, Any]:
        if method.name == "mamba2":
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run(stand, tmp_path, measure, monkeypatch, [1, 2])
    assert [row["batch"] for row in read(tmp_path)] == [1, 2]
    assert not hasattr(stand.model, "_ahn")  # and the model is bare again


def test_objects_that_the_caller_froze_stay_frozen(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.freeze()
    run(stand, tmp_path, lambda *_: {"seconds": 1.0}, monkeypatch, [1])
    assert gc.get_freeze_count() > 0


def test_a_folder_keeps_the_latest_of_equal_rows(tmp_path: Path) -> None:
    row = {**SHARED, "measurement": "decode", "method": "window", "context": 50, "batch": 1, "status": "ok"}
    for seconds in (1.0, 2.0):
        log = Log(tmp_path, {"facts": seconds})
        log.write({**row, "seconds": seconds})
        log.write({**row, "batch": seconds + 1, "seconds": seconds})
    found = read(tmp_path)
    assert [(r["batch"], r["seconds"]) for r in found] == [(2.0, 1.0), (1, 2.0), (3.0, 2.0)]
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "row", "row"] * 2


def test_damaged_and_absent_rows(tmp_path: Path) -> None:
    with pytest.raises(AHNError, match="Cannot read rows"):
        read(tmp_path)
    (tmp_path / FILE).write_text('{"kind": "row", ')
    with pytest.raises(AHNError, match="Cannot read rows"):
        read(tmp_path)
    (tmp_path / FILE).write_text('{"kind": "run"}\n')
    with pytest.raises(AHNError, match="no rows"):
        read(tmp_path)
    with pytest.raises(AHNError, match="Cannot write"):
        Log(tmp_path / FILE, {})

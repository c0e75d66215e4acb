"""Rows on disk: one JSON object per line, written the moment it is measured."""

import datetime
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

import ahn
from ahn.bench.ceilings import query
from ahn.errors import AHNError, reason

FILE = "rows.jsonl"
OK, OUT_OF_MEMORY = "ok", "out of memory"
Row = dict[str, Any]
KEY = (
    "measurement",
    "model",
    "device",
    "dtype",
    "method",
    "adapter",
    "window",
    "sinks",
    "quantized",
    "key_bits",
    "value_bits",
    "context",
    "batch",
)
"""What makes two rows the same measurement."""


NEEDED = ("measurement", "model", "device", "dtype", "method", "status")
"""What every row has, measured or not: a method that the model refuses has no context."""


class Log:
    """Appends lines to `rows.jsonl` in a folder. The first of a run says what all its rows share."""

    def __init__(self, folder: Path, shared: Row) -> None:
        self.path = folder / FILE
        self.run = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S") + f"-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._append({"kind": "run", "run": self.run, "date": _now(), **shared})
        except OSError as error:
            raise AHNError(f"Cannot write {self.path}: {reason(error)}.") from error

    def write(self, row: Row) -> None:
        """Append a row; it is on disk when this returns, whatever happens next."""
        self._append({"kind": "row", "run": self.run, "date": _now(), **row})

    def _append(self, line: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> list[Row]:
    """The rows in a folder in the order of measurement; of those that measured the same, the last."""
    path = folder / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise AHNError(f"Cannot read rows from {path}: {reason(error)}.") from error
    latest: dict[tuple[Any, ...], Row] = {}
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict) or (row.get("kind") == "row" and (absent := [n for n in NEEDED if n not in row])):
            what = f"has no {absent[0]}" if isinstance(row, dict) else "is no object"
            raise AHNError(f"Cannot read rows from {path}: line {number} {what}.")
        if row.get("kind") == "row":
            key = _key(row)
            latest.pop(key, None)
            latest[key] = row
    if not latest:
        raise AHNError(f"There are no rows in {path}; run a measurement first.")
    return list(latest.values())


def _key(row: Row) -> tuple[Any, ...]:
    """By `KEY`. Bits tell rows with quantized tokens apart; those from before they said it are of two bits each."""
    bits = {name: row.get(name, 2) if row.get("quantized") else None for name in ("key_bits", "value_bits")}
    return tuple((row | bits).get(name) for name in KEY)


def hardware(device: torch.device) -> Row:
    """The device by name, with its driver."""
    if device.type != "cuda":
        return {"device": device.type, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        **query(device, ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")),
    }


def code() -> Row:
    """Which code was measured: the commit if there is one, and a digest of the package's sources anyway."""
    package = Path(ahn.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    commit = _git(package, "rev-parse", "HEAD")
    changed = None if commit is None else bool(_git(package, "status", "--porcelain", "--", "."))
    return {"commit": commit, "changed_since": changed, "sources_sha256": digest.hexdigest()}


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

"""Logs of stages, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 1)

    def say(self, what: str) -> None:
        """Print it with the time."""
        print(f"{self.seconds():7.1f} s  {what}", flush=True)


class Log:
    """A JSON-lines file that is also printed, one line at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", buffering=1)
        self._clock = Clock()

    def seconds(self) -> float:
        """Since the log was opened."""
        return self._clock.seconds()

    def write(self, **entry: Any) -> None:
        line = json.dumps({"seconds": self.seconds()} | entry)
        self._file.write(line + "\n")
        print(line, flush=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_text(path: Path, text: str) -> None:
    """Write a file by way of another one, of this process alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)

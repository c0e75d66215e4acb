"""A stage's log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Log:
    """A JSON-lines file that is also printed, one line at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._start = time.perf_counter()

    def write(self, **entry: Any) -> None:
        line = json.dumps({"seconds": round(time.perf_counter() - self._start, 1)} | entry)
        self._file.write(line + "\n")
        print(line, flush=True)

"""Rows of `benchmarks/results`, and the documents that show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> list[dict[str, Any]]:
    """All rows of a file, in its order."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def measured(name: str, **wanted: Any) -> dict[str, Any]:
    """The newest row of a file with these fields."""
    return [row for row in rows(name) if all(row.get(key) == value for key, value in wanted.items())][-1]


def document(name: str) -> str:
    """A document as one line with single spaces and without stars, so that neither line breaks nor bold type count."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").replace("*", "").split())

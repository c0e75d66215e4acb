"""What there is to see of a study's rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from ahn.measure.intervals import wilson

from .ways import FULL, WINDOW

Row = dict[str, Any]


def table(rows: Iterable[Row]) -> str:
    """A line for each stage and name, from the latest row of it that is no error."""
    latest = {(row["stage"], row["name"]): row for row in rows if "error" not in row}
    full, window = (latest.get(("rows", name)) for name in (FULL, WINDOW))
    return "\n".join("  ".join(_cells(row, full, window)) for row in latest.values())


def _cells(row: Row, full: Row | None, window: Row | None) -> list[str]:
    cells = [f"{row['stage']:8s}", f"{row['name']:52s}"]
    cells += [f"{row['cache_bytes'] / 2**20:6.1f} MiB"] if "cache_bytes" in row else []
    for kind in ("prose_loss", "code_loss"):
        if kind in row:
            cells.append(f"{kind.partition('_')[0]} {row[kind]:.3f}{_won(row, full, window, kind)}")
    cells += [_share(row, kind) for kind in ("one", "several", "far") if f"{kind}_asked" in row]
    if "scores" in row:
        each = {name.split("/")[1]: 100 * statistics.mean(x) for name, x in row["scores"].items()}
        cells.append(f"mean {statistics.mean(each.values()):.1f} %")
        cells += [f"{name} {score:.0f}" for name, score in each.items()]
    if "book_losses" in row:
        cells.append("loss by position " + " ".join(f"{x:.2f}" for x in row["book_losses"]))
    if "recall" in row:
        cells.append(f"{row['steps']} steps, recall {row['recall']:.3f}")
    return [*cells, f"{row['seconds']} s"]


def _won(row: Row, full: Row | None, window: Row | None, name: str) -> str:
    if not (full and window) or full[name] == window[name]:
        return ""
    return f" ({100 * (window[name] - row[name]) / (window[name] - full[name]):.0f} %)"


def _share(row: Row, kind: str) -> str:
    right, total = row[f"{kind}_right"], row[f"{kind}_asked"]
    low, high = wilson(right, total)
    return f"{kind} {100 * right / total:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"

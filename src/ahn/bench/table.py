"""Rows as tables, one a measurement, and as one line each while they are measured."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ahn.bench.records import OK, Row

TITLES = {
    "prefill": "Prefill: reading a prompt",
    "decode": "Decode: one more token",
    "memory": "Memory: reading, then writing on",
    "throughput": "Throughput: conversations that decode together",
    "train": "Training: one step of self-distillation",
}
WIDTH = 160
"""Of the text in columns; it is not folded to the terminal, for a folded table cannot be read at all."""
Column = tuple[str, Callable[[Row], str]]


def tokens(count: int | None) -> str:
    """131072 as "128k"."""
    if count is None:
        return ""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def _three_digits(name: str, scale: float) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{float(f'{value * scale:.3g}'):g}"

    return show


def _number(name: str, digits: int, scale: float = 1.0, suffix: str = "") -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{value * scale:,.{digits}f}{suffix}"

    return show


def _phases(name: str) -> Callable[[Row], str]:
    """Milliseconds of the phases in order, teacher to backward."""

    def show(row: Row) -> str:
        return " + ".join(f"{1e3 * seconds:.0f}" for seconds in (row.get(name) or {}).values())

    return show


_SPREAD: Column = ("spread", _number("spread", 1, 100, " %"))
_PEAK: Column = ("peak GB", _three_digits("peak_bytes", 1e-9))
_RATE: Column = ("tokens/s", _number("tokens_per_second", 0))
_CACHE: Column = ("cache GB", _three_digits("cache_bytes", 1e-9))


def _limit(name: str, scale: float, digits: int) -> list[Column]:
    return [
        ("GB", _three_digits("bytes", 1e-9)),
        ("TFLOP", _three_digits("flops", 1e-12)),
        (name, _number("limit_s", digits, scale)),
        ("share", _number("share", 0, 100, " %")),
    ]


_MS: Column = ("ms/token", _number("seconds", 2, 1e3))
_GENERATE: Column = ("generate", _number("generate_s", 2, 1e3))
_PHASES: list[Column] = [("ms by phase", _phases("phases_s")), ("of the host", _phases("host_phases_s"))]
COLUMNS: dict[str, list[Column]] = {
    "prefill": [("s", _number("seconds", 3)), _SPREAD, _RATE, _PEAK, *_limit("limit s", 1, 3)],
    "decode": [_MS, _SPREAD, _GENERATE, _PEAK, _CACHE, *_limit("limit ms", 1e3, 3)],
    "memory": [
        ("prefill GB", _three_digits("prefill_peak_bytes", 1e-9)),
        ("decode GB", _three_digits("decode_peak_bytes", 1e-9)),
        _CACHE,
        ("weights GB", _three_digits("weights_bytes", 1e-9)),
        ("read s", _number("prefill_s", 2)),
    ],
    "throughput": [_RATE, ("ms/step", _number("seconds", 2, 1e3)), _SPREAD, _PEAK, *_limit("limit ms", 1e3, 3)],
    "train": [("s", _number("seconds", 3)), _SPREAD, _RATE, _PEAK, *_limit("limit s", 1, 3), *_PHASES],
}


def text(rows: Sequence[Row]) -> str:
    """All tables, as wide as they need to be."""
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False, file=io.StringIO())
    with console.capture() as captured:
        console.print(*_tables(rows))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each measurement, model and device among the rows, sorted by context, batch and method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for measurement in TITLES:
        for row in rows:
            if row["measurement"] == measurement:
                groups.setdefault((measurement, row["model"], row["device"], row["dtype"]), []).append(row)
    return [
        _table(key, sorted(group, key=lambda row: (*_size(row), methods.index(row["method"]))))
        for key, group in groups.items()
    ]


def _size(row: Row) -> tuple[int, int]:
    return row.get("context") or 0, row.get("batch") or 0


def _table(key: tuple[Any, ...], rows: Sequence[Row]) -> Table:
    measurement, model, device, dtype = key
    title = f"\n{TITLES[measurement]}. {model}, {dtype}, {device}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading in ("context", "batch"):
        table.add_column(heading, justify="right")
    table.add_column("method", no_wrap=True)
    table.add_column("window", justify="right", no_wrap=True)
    for heading, _ in COLUMNS[measurement]:
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold")
    for row in rows:
        exact = "" if row.get("window") is None else f"{row['sinks']}+{row['window']}"
        if row.get("quantized"):  # rows from before they said it are of two bits each
            exact += f"+{row['quantized']} at {row.get('key_bits', 2)}/{row.get('value_bits', 2)} bits"
        shown = [show(row) for _, show in COLUMNS[measurement]]
        note = row["status"] if row["status"] != OK else "generate failed" if "generate_why" in row else ""
        table.add_row(tokens(row.get("context")), str(row.get("batch") or ""), row["method"], exact, *shown, note)
    return table


def line(row: Row) -> str:
    """A row in one line."""
    where = [row["measurement"], row["method"], tokens(row.get("context")), f"× {row.get('batch', '')}"]
    if row["status"] != OK:
        return " ".join([*where, f"{row['status']}: {row['why'][:300]}"])
    shown = [f"{heading} {show(row)}" for heading, show in COLUMNS[row["measurement"]] if show(row)]
    return " ".join([*where, "|", ", ".join(shown)])

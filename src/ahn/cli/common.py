"""What the verbs share: where output goes, progress bars, and common options.

Results go to standard output, so that they can be piped; everything else goes to standard error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ahn.cli.terminal import SafeConsole
from ahn.config import DTYPES

out = SafeConsole()
err = SafeConsole(stderr=True)

AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Adapter for the model: a directory, a Hub id, or the kind of a shipped one.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window", "--sliding-window", min=1, help="Last tokens kept exactly (default: the adapter's, else 32640)."
    ),
]
SinksOption = Annotated[
    int | None,
    typer.Option(
        "--sinks", "--num-attention-sink", min=0, help="First tokens kept exactly (default: the adapter's, else 128)."
    ),
]
QuantizedOption = Annotated[
    int | None,
    typer.Option(
        "--quantized",
        min=0,
        help="Tokens before the window still seen at a few bits per number (default: the adapter's, else 0).",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or mps (default: the fastest there is).")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help=f"{', '.join(DTYPES)} (default: float32 on a CPU, else the checkpoint's own)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(value: Any) -> None:
    """Write a value of JSON types to standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_pairs(rows: Iterable[tuple[str, str]], to: SafeConsole = out) -> None:
    """Write names and values, one pair per line, the values aligned; to standard output unless said otherwise."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    to.print(table)


def progress() -> Progress:
    """A progress display on standard error, for `with progress() as bar: bar.add_task(text, total=n)`."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,  # it would leave an empty line in a log
    )

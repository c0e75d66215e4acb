"""What the verbs share: where output goes, progress bars, and common options.

Results go to standard output, so that they can be piped; everything else goes to standard error.
"""

import json
import time
from collections.abc import Iterable
from typing import Annotated, Any, Self

import typer
from rich.cells import cell_len
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ahn.cli.terminal import SafeConsole
from ahn.config import DTYPES
from ahn.errors import AHNError

out = SafeConsole()
err = SafeConsole(stderr=True)
NARROW = 60
"""Columns below which names and values are not put beside each other."""
PATIENCE = 30.0
"""Seconds between two lines about long work where there is no terminal for a bar."""

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--base-model",
        help="Base model (with --adapter, or for a baseline), merged checkpoint or adapter: a directory or a Hub id; "
        "or tiny, the small model that comes with ahn (default), or smollm2, which is found or downloaded.",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter", "--ahn-path", help="Adapter for the model: a directory, a Hub id, or the kind of a shipped one."
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        "--sliding-window",
        min=1,
        help="Last tokens kept exactly (default: the adapter's, else 32640, or less if the base was trained on less).",
    ),
]
SinksOption = Annotated[
    int | None,
    typer.Option(
        "--sinks",
        "--num-attention-sink",
        min=0,
        help="First tokens kept exactly (default: the adapter's, else 128, or less).",
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


def refuse_useless(why: str, **given: Any) -> None:
    """Refuse options that were given and change nothing.

    Args:
        why: where they do not, after "changes nothing".
        given: by the options' names; what is False, 0, empty or None was not given.
    """
    for name, value in given.items():
        if value not in (None, False, 0, [], ()):
            raise AHNError(f"--{name.replace('_', '-')} changes nothing {why}: leave it out.")


def tell(text: str, style: str | None = None) -> None:
    """Lines for the person, on standard error; where programs read them, each is one line."""
    err.print(text, style=style, soft_wrap=not err.is_terminal)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_pairs(rows: Iterable[tuple[str, str]], to: SafeConsole = out) -> None:
    """Write names and values, one pair per line, the values aligned; to standard output unless said otherwise.

    On a terminal too narrow for that, a value that does not fit stands below its name.
    """
    rows = list(rows)
    if to.width < NARROW:
        for name, value in rows:
            fits = len(name) + len(value.strip()) + 2 <= to.width
            to.print(name, style="bold", end="  " if fits else "\n")
            to.print(value.strip() if fits else Padding(" ".join(value.split()), (0, 0, 0, 2)))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    to.print(table)


def print_tables(*tables: Table) -> None:
    """Write tables to standard output.

    On a narrow terminal headings and names fold between words, and numbers stay whole: if that is not enough, lines are
    longer than the terminal.
    """
    for table in tables:
        for number, column in enumerate(table.columns):
            cells = [str(cell) for cell in column.cells]
            parts = (
                " ".join([str(column.header), *cells]).split() if number == 0 else [*str(column.header).split(), *cells]
            )
            column.no_wrap, column.min_width = False, max(map(cell_len, parts), default=0)
        least = Measurement.get(out, out.options.update(max_width=1 << 12), table).minimum
        if least > out.width:
            table.width = least
        out.print(table, crop=False)


class ProgressLines(Progress):
    """A display that, where there is no terminal, is a line of what moved last, every `PATIENCE` seconds."""

    _told = 0.0

    def __enter__(self) -> Self:
        self._told = time.monotonic()
        super().__enter__()
        return self

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if not self.disable or time.monotonic() - self._told < PATIENCE:
            return
        self._told = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        total = "" if task.total is None else f" of {task.total:,.0f}"
        self.console.print(f"{task.description}: {task.completed:,.0f}{total}")


def progress(*amount: ProgressColumn) -> Progress:
    """A progress display on standard error, for `with progress() as bar: bar.add_task(text, total=n)`.

    Args:
        amount: how much is done, in place of numbers and the time since the beginning.
    """
    return ProgressLines(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *(amount or (MofNCompleteColumn(), TimeElapsedColumn())),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,  # it would leave an empty line in a log
    )

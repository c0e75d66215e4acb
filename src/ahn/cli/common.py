"""What the verbs share: where output goes, progress bars, common options, and loading a model with clear errors.

Results go to standard output, so that they can be piped; everything else goes to standard error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ahn.errors import AHNError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

DTYPES = ("float32", "bfloat16", "float16")

AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="Adapter to put on the model: a directory or a Hub id.")
]
WindowOption = Annotated[
    int | None, typer.Option("--window", min=1, help="Last tokens kept exactly (default: the adapter's, else 32640).")
]
SinksOption = Annotated[
    int | None, typer.Option("--sinks", min=0, help="First tokens kept exactly (default: the adapter's, else 128).")
]
QuantizedOption = Annotated[
    int | None,
    typer.Option(
        "--quantized",
        min=0,
        help="Tokens before the window still seen at two bits a number (default: the adapter's, else 0).",
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


def print_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Write names and values to standard output, one pair a line, the values aligned."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)


def progress() -> Progress:
    """A progress display on standard error, for `with progress() as bar: bar.add_task(text, total=n)`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,  # it would leave an empty line in a log
    )


def load_model(
    model: str,
    adapter: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    quantized: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its memory, ready to read, and its tokenizer.

    Args:
        model: directory or Hub id of a base model (with `adapter`), a merged checkpoint or an adapter.
        adapter: directory or Hub id of an adapter for `model`.
        window, sinks, quantized: as in `AHNConfig`; None takes the defaults.
        device: a torch device; None takes CUDA, else MPS, else the CPU.
        dtype: one of `DTYPES`; None takes float32 on a CPU and the checkpoint's own dtype elsewhere.

    Raises:
        AHNError: a path, device or dtype is wrong, or the checkpoint cannot be loaded.
    """
    from ahn.checkpoint import from_pretrained
    from ahn.checkpoint.directory import Checkpoint
    from ahn.checkpoint.hub import local_directory

    source, base = (adapter, model) if adapter else (model, None)
    if adapter is None and Checkpoint.open(local_directory(model)).kind == "base":
        raise AHNError(f"{model} is a plain model without a memory; name an adapter for it with --adapter.")
    settings = {"window": window, "sinks": sinks, "quantized": quantized}
    return _load(model, lambda **how: from_pretrained(source, base=base, **settings, **how), device, dtype)


def load_base(
    model: str, device: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without a memory and its tokenizer; all else as `load_model`."""
    from transformers import AutoModelForCausalLM

    return _load(model, functools.partial(AutoModelForCausalLM.from_pretrained, model), device, dtype)


def _load(
    model: str, load: Callable[..., PreTrainedModel], device: str | None, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers
    from transformers import AutoTokenizer

    place = pick_device(device)
    chosen = dtype or ("float32" if place.type == "cpu" else "auto")
    if chosen not in (*DTYPES, "auto"):
        raise AHNError(f"Unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}.")
    if not err.is_terminal:
        transformers.utils.logging.disable_progress_bar()  # of loading weights: noise in a log
    try:
        loaded = load(dtype=chosen)
        # an adapter has no tokenizer of its own; the loaded model knows where its base came from
        tokenizer = AutoTokenizer.from_pretrained(loaded.name_or_path)
    except AHNError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(model, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up when the files are absent
        raise AHNError(f"{loaded.name_or_path} has no tokenizer beside its weights (tokenizer.json).")
    return loaded.to(place).eval(), tokenizer


def pick_device(name: str | None) -> torch.device:
    """The torch device called `name`, or the fastest there is.

    Raises:
        AHNError: there is no such device here.
    """
    import torch

    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise AHNError(f"There is no device {name!r} here; `ahn env` lists what there is.") from None
    return device


def unreadable(model: str, error: Exception) -> AHNError:
    """The first line of what transformers or the Hub said about a model, as this package's error."""
    first = str(error).strip().partition("\n")[0]
    return AHNError(f"Cannot load {model!r}: {first or type(error).__name__}")

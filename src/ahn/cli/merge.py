"""`ahn merge`: one checkpoint from a base model and an adapter."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import DownloadColumn, TransferSpeedColumn

from ahn.cli import common


def command(
    base_model: Annotated[
        str, typer.Option("--base-model", "--model", help="Base: a directory, a Hub id, tiny or smollm2.")
    ],
    ahn_path: Annotated[str, typer.Option("--ahn-path", "--adapter", help="Adapter: a directory or a Hub id.")],
    output_path: Annotated[Path, typer.Option("--output-path", help="New directory for the merged checkpoint.")],
    as_json: common.JsonOption = False,
) -> None:
    """Put a base model and an adapter into one checkpoint.

    Tensors are copied byte for byte, a slice at a time, so this works for a
    model of any size in little memory. The result appears under its name only
    when it is complete. No model is built and nothing is converted.

    \b
    Example:
      ahn merge --base-model ./Qwen2.5-3B --ahn-path ./AHN-3B --output-path ./out
    """
    from ahn.checkpoint import merge, shipped

    base, adapter = shipped.resolve(base_model), shipped.resolve_adapter(base_model, ahn_path)
    assert adapter is not None
    written = copy_with_progress("merging", lambda report: merge(base, adapter, output_path, report))
    say(as_json, written | {"output": str(output_path)}, f"Wrote {output_path}")


def copy_with_progress(text: str, copy: Callable[[Callable[[int, int], None]], Any]) -> dict[str, Any]:
    """Run `copy` with a progress bar in bytes on standard error; returns bytes and seconds."""
    start = time.perf_counter()
    with common.progress(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(text, total=None)
        copy(lambda copied, total: bar.update(task, completed=copied, total=total))
        done = int(bar.tasks[0].completed)
    return {"bytes": done, "seconds": round(time.perf_counter() - start, 3)}


def say(as_json: bool, result: dict[str, Any], text: str) -> None:
    if as_json:
        common.print_json(result)
    else:
        typer.echo(f"{text}: {result['bytes'] / 1e9:.3f} GB of tensors in {result['seconds']:.1f} s")

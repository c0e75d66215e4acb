"""`ahn split`: a merged checkpoint taken apart again."""

from pathlib import Path
from typing import Annotated

import typer

from ahn.cli import common
from ahn.cli.merge import copy_with_progress, say


def command(
    model: Annotated[
        str, typer.Option("--model", help="Merged checkpoint, ours or published: a directory or a Hub id.")
    ],
    output_path: Annotated[Path, typer.Option("--output-path", help="New directory for the two parts.")],
    as_json: common.JsonOption = False,
) -> None:
    """Take a merged checkpoint apart into base model and adapter.

    OUTPUT/base is an ordinary model, OUTPUT/adapter its memory. Tensors are
    copied byte for byte, a slice at a time. The adapter names the base beside
    it: `ahn generate --model OUTPUT/adapter` finds both, also after both moved.

    \b
    Example:
      ahn split --model ./merged --output-path ./parts
    """
    from ahn.checkpoint import split

    written = copy_with_progress("splitting", lambda report: split(model, output_path, report))
    parts = {"base": str(output_path / "base"), "adapter": str(output_path / "adapter")}
    say(as_json, written | parts, f"Wrote {parts['base']} and {parts['adapter']}")

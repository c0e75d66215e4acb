"""What a program printed, drawn as the screen of a terminal:

ahn demo | head -n 36 | python benchmarks/screen.py 'ahn demo' docs/images/demo-screen.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ahn.files import write_text

FONTS = re.compile(r"@font-face \{.*?\}\s*", flags=re.DOTALL)
"""Where rich would have a page load fonts from; without them a browser takes its own."""


def main() -> None:
    """Standard input, with its colours, into a file."""
    title, out = sys.argv[1:]
    said = Text.from_ansi(sys.stdin.read())
    console = Console(record=True, width=max(line.cell_len for line in said.split()), file=io.StringIO())
    console.print(said, soft_wrap=True)
    screen = console.export_svg(title=title, unique_id="screen")
    write_text(Path(out), FONTS.sub("", screen).replace("Fira Code", "ui-monospace"))


if __name__ == "__main__":
    main()

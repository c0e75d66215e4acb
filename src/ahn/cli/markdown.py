"""A reply's Markdown on a terminal: a block is rendered once it is whole; the one being written is shown as it is."""

import re
from typing import Any, Self

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from ahn.cli.terminal import visible

FENCE = re.compile(r" {0,3}(```|~~~)")
"""What begins and ends a block of code, in which empty lines end nothing."""


class MarkdownReply:
    """Takes a reply piece by piece inside a `with` block, and shows it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._unfinished = ""
        self._live = Live(console=console, transient=True, auto_refresh=True, refresh_per_second=10)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.update(Text(""))
        self._live.stop()
        if self._unfinished.strip():
            self.console.print(rendered(self._unfinished))

    def __call__(self, piece: str) -> None:
        whole, self._unfinished = split(self._unfinished + piece)
        if whole.strip():
            self._live.update(Text(""))
            self.console.print(rendered(whole))
        tail = visible(self._unfinished).split("\n")[2 - self.console.height :]
        self._live.update(Text("\n".join(tail)))


def split(text: str) -> tuple[str, str]:
    """Blocks that are whole, and the rest, which may go on: a block ends at an empty line that is not in code."""
    lines = text.split("\n")
    end, fence = 0, ""
    for number, line in enumerate(lines[:-1], start=1):
        found = FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif found and found[1] == fence:
            fence, end = "", number
        elif not fence and not line.strip():
            end = number
    return "".join(f"{line}\n" for line in lines[:end]), "\n".join(lines[end:])


def rendered(text: str) -> Markdown:
    """As Markdown with an empty line below. Tags and links stay what they say: nothing of a reply is hidden."""
    text = visible(text)
    made = Markdown(text, hyperlinks=False, code_theme="ansi_dark")
    made.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    return made

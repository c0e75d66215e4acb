"""Markdown of replies on a terminal: blocks are rendered when they are whole, and nothing of a reply is lost."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ahn.cli.markdown import MarkdownReply, split

REPLY = """# Title

Some **bold** text with <tags> and `code`.

1. one

2. two

```python
def f():

    return "**x**"
```
The end [here](https://example.org) \x1b[2Jcleared"""


def shown(reply: str, size: int) -> str:
    """What stays on the screen, without colours and what Live drew in between."""
    file = io.StringIO()
    console = Console(file=file, width=60, height=12, force_terminal=True, color_system=None)
    with MarkdownReply(console) as say:
        say._live.auto_refresh = False
        for start in range(0, len(reply), size):
            say(reply[start : start + size])
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_it_is_rendered_however_it_comes(size: int) -> None:
    text = shown(REPLY, size)
    assert "**bold**" not in text and "Some bold text with <tags> and code." in text
    assert re.search(r"^ *1 one", text, flags=re.M) and re.search(r"^ *2 two", text, flags=re.M)
    assert 'return "**x**"' in text, "code stays as it is"
    assert "here (https://example.org)" in text, "where a link leads is seen"
    assert "\\x1b[2Jcleared" in text, "no command to the terminal"


def test_blocks_end_at_empty_lines_that_are_not_in_code() -> None:
    assert split("a\nb\n\nc") == ("a\nb\n\n", "c")
    assert split("a\n") == ("", "a\n")
    code = "```\nx\n\ny\n"
    assert split(code) == ("", code)
    assert split(f"{code}```\nz") == (f"{code}```\n", "z")

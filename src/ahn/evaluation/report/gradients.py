"""Gradient norms drawn on the text that they belong to: as HTML and as a figure."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, FEWEST_COLUMNS = 110, 70
"""Characters per line of the figure: at most, and at least."""
MOST_LINES, LINES_AFTER = 48, 6
"""Lines of the figure, and how many of them show what follows the memory's part of the text."""
FONT_SIZE, ADVANCE = 7.5, 0.602
"""Points, and a character's share of them: the width of DejaVu Sans Mono, which matplotlib brings along."""
MARGIN = 0.2
"""Inches."""
HOT = (209, 73, 91)
QUANTILE = 0.98
"""Of the norms; what is longer is drawn as if it were as long. Single tokens would leave the rest pale."""

Token = dict[str, Any]
"""A line of `gradients.jsonl`: token, norm, region."""


def strengths(tokens: Sequence[Token]) -> list[float | None]:
    """0 to 1 for tokens in the memory, None for others."""
    norms = sorted(token["norm"] for token in tokens if token["region"] == "remembered")
    top = norms[min(len(norms) - 1, math.floor(QUANTILE * len(norms)))] if norms else 0.0
    return [
        None if token["region"] != "remembered" else min(1.0, token["norm"] / top) if top else 0.0 for token in tokens
    ]


def as_html(tokens: Sequence[Token]) -> str:
    """The text with a background for each remembered token; others are grey."""
    parts = ['<pre class="gradients">']
    for token, strength in zip(tokens, strengths(tokens), strict=True):
        text = html.escape(token["token"])
        if strength is None:
            parts.append(f'<span class="{html.escape(str(token["region"]))}">{text}</span>')
            continue
        red, green, blue = HOT
        colour = f"rgba({red},{green},{blue},{strength:.2f})"
        parts.append(f'<span style="background:{colour}" title="{token["norm"]:.2e}">{text}</span>')
    return "".join([*parts, "</pre>"])


def figure(title: str, tokens: Sequence[Token]) -> Figure:
    """The end of the memory's part of the text, as much as fits, and the beginning of what follows."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = _lines(tokens)
    last = max((n for n, line in enumerate(lines) for part in line if part.region == "remembered"), default=0)
    shown = lines[: last + 1 + LINES_AFTER][-MOST_LINES:]
    columns = max([FEWEST_COLUMNS, *(part.start + len(part.text) for line in shown for part in line)])
    width, height = columns * FONT_SIZE * ADVANCE / 72, len(shown) * FONT_SIZE * 1.45 / 72
    whole = (width + 2 * MARGIN, height + 3 * MARGIN)
    drawn = Figure(figsize=whole)
    axis = drawn.add_axes((MARGIN / whole[0], MARGIN / whole[1], width / whole[0], height / whole[1]))
    axis.set_xlim(0, columns)
    axis.set_ylim(len(shown), 0)
    axis.axis("off")
    for number, line in enumerate(shown):
        for start, text, strength, region in line:
            if strength:
                colour = tuple(part / 255 for part in HOT)
                axis.add_patch(Rectangle((start, number), len(text), 1, color=colour, alpha=strength, linewidth=0))
            ink = "#9aa3ad" if region != "remembered" else "#1d242b"
            # A text for each token keeps every character in its cell, whatever the font falls back to.
            style: dict[str, Any] = {
                "family": "DejaVu Sans Mono",
                "fontsize": FONT_SIZE,
                "va": "center",
                "parse_math": False,
            }
            axis.text(start, number + 0.5, text, color=ink, **style)
    drawn.suptitle(title, fontsize=10, x=MARGIN / whole[0], y=1 - MARGIN / whole[1], ha="left", va="top")
    return drawn


class _Part(NamedTuple):
    """What a line shows of a token, from a column on."""

    start: int
    text: str
    strength: float | None
    region: str


def _lines(tokens: Sequence[Token]) -> list[list[_Part]]:
    """The text in lines of at most `COLUMNS` characters."""
    lines: list[list[_Part]] = [[]]
    for token, strength in zip(tokens, strengths(tokens), strict=True):
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in token["token"].expandtabs(4))
        for n, piece in enumerate(text.split("\n")):
            if n:
                lines.append([])
            while piece:
                column = lines[-1][-1].start + len(lines[-1][-1].text) if lines[-1] else 0
                if column == COLUMNS:
                    lines.append([])
                    column = 0
                lines[-1].append(_Part(column, piece[: COLUMNS - column], strength, token["region"]))
                piece = piece[COLUMNS - column :]
    return lines

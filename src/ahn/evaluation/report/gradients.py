"""Gradient norms drawn on the text that they belong to."""

import html
import math
from collections.abc import Sequence
from typing import Any

HOT = "209,73,91"
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
        else:
            colour = f"rgba({HOT},{strength:.2f})"
            parts.append(f'<span style="background:{colour}" title="{token["norm"]:.2e}">{text}</span>')
    return "".join([*parts, "</pre>"])

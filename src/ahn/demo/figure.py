"""The demonstration as a figure: perplexity and cache by position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ahn.demo.comparison import Comparison, Result
from ahn.demo.methods import FULL, WINDOW_ONLY
from ahn.plots import MUTED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIXED = {FULL: "#5b6470", WINDOW_ONLY: "#e0a030"}
MEMORIES = ("#d1495b", "#2e86ab", "#6a994e", "#8e6bbf")


def comparison_figure(comparison: Comparison, title: str) -> Figure:
    """Two panels over the position in the document: perplexity of the real text, and bytes of the cache."""
    figure, (text, cache) = new_figure(2, title)
    for result, colour in zip(comparison.results, _colours(comparison.results), strict=True):
        style = {"color": colour, "linewidth": 2 if result.is_memory else 1.6, "label": result.name}
        starts = [n * comparison.bin for n in range(len(result.loss_by_position))]
        points = [
            (start + comparison.bin / 2, math.exp(loss))
            for start, loss in zip(starts, result.loss_by_position, strict=True)
            if loss is not None
        ]
        text.plot(*zip(*points, strict=True), **style)
        tokens, sizes = zip(*result.cache_by_position, strict=True)
        cache.plot(tokens, [size / 2**20 for size in sizes], **style)
        if result.name == FULL or result.name == comparison.best_memory.name:
            _end_value(cache, tokens[-1], sizes[-1] / 2**20, colour)
    text.set_title(f"Perplexity of the next {comparison.bin} tokens (lower is better)", fontsize=10, loc="left")
    text.set_yscale("log")
    text.yaxis.set_major_formatter("{x:g}")
    text.yaxis.set_minor_formatter("{x:g}")
    cache.set_title("Cache (MiB)", fontsize=10, loc="left")
    cache.set_ylim(bottom=0)
    for axis in (text, cache):
        _positions(axis, comparison)
    text.legend(frameon=False, fontsize=9)
    return figure


def _colours(results: list[Result]) -> list[str]:
    memories = [result.name for result in results if result.is_memory]
    return [FIXED.get(r.name) or MEMORIES[memories.index(r.name) % len(MEMORIES)] for r in results]


def _positions(axis: Any, comparison: Comparison) -> None:
    axis.set_xlim(0, comparison.length)
    axis.set_xlabel("position in the document (tokens)")
    lossless = comparison.window + comparison.sinks
    label = f"{lossless:,} exact tokens"
    axis.axvline(lossless, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, label=label)


def _end_value(axis: Any, x: float, y: float, colour: str) -> None:
    axis.annotate(f"{y:.1f}", (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10, color=colour)

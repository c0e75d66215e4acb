"""The demonstration as a figure: loss above full attention, and cache, by position."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from ahn.demo.comparison import Comparison, Result
from ahn.demo.methods import FULL, WINDOW_ONLY
from ahn.measure.plots import COLOURS, MUTED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIXED = {FULL: COLOURS["full"], WINDOW_ONLY: COLOURS["window"]}
QUANTIZED, QUANTIZED_AND_MEMORY = "#a58bd3", "#4b2e83"
MEMORIES = ("#d1495b", "#2e86ab", "#6a994e", "#b07d4f")


def comparison_figure(comparison: Comparison, title: str) -> Figure:
    """Two panels over the position in the document: loss of the real text above full attention's, bytes of the cache.

    Differences, because a text is harder in some places than in others by far more than methods differ.
    """
    figure, (text, cache) = new_figure(2, title)
    full = next(result for result in comparison.results if result.name == FULL).loss_by_position
    for result, colour in zip(comparison.results, _colours(comparison.results), strict=True):
        style = {"color": colour, "linewidth": 1.8, "label": result.name}
        points = [
            ((n + 0.5) * comparison.bin, loss - lowest)
            for n, (loss, lowest) in enumerate(zip(result.loss_by_position, full, strict=True))
            if loss is not None and lowest is not None
        ]
        text.plot(*zip(*points, strict=True), **style)
        tokens, sizes = zip(*result.cache_by_position, strict=True)
        cache.plot(tokens, [size / 2**20 for size in sizes], **style)
        if result.name == FULL or result.name == comparison.best_memory.name:
            _end_value(cache, tokens[-1], sizes[-1] / 2**20, colour)
    text.set_title("Loss above full attention (nats per token, lower is better)", fontsize=10, loc="left")
    cache.set_title("Cache (MiB)", fontsize=10, loc="left")
    cache.set_ylim(bottom=0)
    for axis in (text, cache):
        _positions(axis, comparison)
    text.legend(frameon=False, fontsize=9)
    return figure


def _colours(results: list[Result]) -> list[str]:
    found, memories = [], itertools.cycle(MEMORIES)
    for result in results:
        first, _, memory = result.name.partition(" + ")
        if result.name in FIXED:
            found.append(FIXED[result.name])
        elif first.endswith(" bits"):
            found.append(QUANTIZED_AND_MEMORY if memory else QUANTIZED)
        else:
            found.append(next(memories))
    return found


def _positions(axis: Any, comparison: Comparison) -> None:
    axis.set_xlim(0, comparison.length)
    axis.set_xlabel("position in the document (tokens)")
    lossless = comparison.window + comparison.sinks
    label = f"{lossless:,} exact tokens"
    axis.axvline(lossless, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, label=label)


def _end_value(axis: Any, x: float, y: float, colour: str) -> None:
    axis.annotate(f"{y:.1f}", (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10, color=colour)

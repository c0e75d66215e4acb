"""The demonstration as a figure: loss above full attention, and cache, by position."""

from typing import Any

from matplotlib.figure import Figure

from ahn.demo.comparison import Comparison, Result
from ahn.demo.methods import FULL, WINDOW_ONLY
from ahn.measure.plots import DASHED, MUTED, WIDTH, colours, end_value, finish, new_figure

SHADE = 0.18
"""Opacity of the range over documents."""


def comparison_figure(comparison: Comparison, title: str) -> Figure:
    """Two panels over the position in the document: loss of the real text above full attention's, bytes of the cache.

    Differences, because a text is harder in some places than in others by far more than methods differ. They are means
    over the documents; the shade around sinks + window and around the best memory goes from the lowest document to the
    highest.
    """
    count = len(comparison.documents)
    read = "1 document" if count == 1 else f"{count} documents, their mean"
    figure, (text, cache) = new_figure(2, f"{title}: {read}")
    full = next(result for result in comparison.results if result.name == FULL)
    shaded = (WINDOW_ONLY, comparison.best_memory.name) if count > 1 else ()
    own = colours({result.name: kind(result.name) for result in comparison.results})
    for result in comparison.results:
        colour = own[result.name]
        style = {"color": colour, "linewidth": WIDTH, "label": result.name}
        above = _above(result.loss_by_position, full.loss_by_position, comparison.bin)
        text.plot(above.keys(), above.values(), **style)
        if result.name in shaded:
            _shade(text, result, full, comparison.bin, colour)
        tokens, sizes = zip(*result.cache_by_position, strict=True)
        cache.plot(tokens, [size / 2**20 for size in sizes], **style)
        if result.name == FULL or result.name == comparison.best_memory.name:
            end_value(cache, tokens[-1], sizes[-1] / 2**20, f"{sizes[-1] / 2**20:.1f}", colour)
    text.set_title("Loss above full attention (nats per token, lower is better)", fontsize=10, loc="left")
    cache.set_title("Cache (MiB)", fontsize=10, loc="left")
    cache.set_ylim(bottom=0)
    for axis in (text, cache):
        _positions(axis, comparison)
    finish(figure, [text, cache], ["shade: lowest to highest document"] if shaded else [])
    return figure


def kind(name: str) -> str:
    """Of `ahn.measure.plots.COLOURS`."""
    first, _, memory = name.partition(" + ")
    if first.endswith(" bits"):
        return "bits + memory" if memory else "bits"
    return {FULL: "full", WINDOW_ONLY: "window"}.get(name, name.partition(" #")[0])


def _above(losses: list[float | None], full: list[float | None], size: int) -> dict[float, float]:
    """Middle of a bin to what the loss there is above full attention's."""
    return {
        (n + 0.5) * size: loss - lowest
        for n, (loss, lowest) in enumerate(zip(losses, full, strict=True))
        if loss is not None and lowest is not None
    }


def _shade(axis: Any, result: Result, full: Result, size: int, colour: str) -> None:
    """From the document with the lowest difference at a position to the one with the highest."""
    found: dict[float, list[float]] = {}
    for losses, lowest in zip(result.loss_by_document, full.loss_by_document, strict=True):
        for middle, above in _above(losses, lowest, size).items():
            found.setdefault(middle, []).append(above)
    middles = sorted(found)
    lows, highs = ([edge(found[middle]) for middle in middles] for edge in (min, max))
    axis.fill_between(middles, lows, highs, color=colour, alpha=SHADE, linewidth=0)


def _positions(axis: Any, comparison: Comparison) -> None:
    axis.set_xlim(0, comparison.length)
    axis.set_xlabel("position in the document (tokens)")
    lossless = comparison.window + comparison.sinks
    label = f"{lossless:,} exact tokens"
    axis.axvline(lossless, color=MUTED, linestyle=DASHED, linewidth=1, label=label)

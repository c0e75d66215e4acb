"""Figures. Each function returns a matplotlib figure of its own; `save` writes it. No display and no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.costs import Cost
from ahn.errors import AHNError
from ahn.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL, AHN, MUTED = "#5b6470", "#d1495b", "#9aa3ad"
"""Colours: the model as it is, the model with its memory, everything that is only there to help."""
COLOURS = {"full": FULL, "window": "#e0a030", "gated_deltanet": AHN, "deltanet": "#2e86ab", "mamba2": "#6a994e"}
"""Of what is compared, by method or memory: the same in every figure."""


def new_figure(panels: int, title: str, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure with panels side by side in each of its rows, and their axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 4.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, panels, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, which="major", color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=12)
    return figure, axes


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix (png, svg, pdf) says how. The file appears whole or not at all.

    Raises:
        AHNError: the directory does not exist, or matplotlib cannot write this kind of file.
    """
    path = Path(path)
    kinds = sorted(figure.canvas.get_supported_filetypes())
    kind = path.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise AHNError(f"Cannot write a figure as {path.name!r}; its suffix must be one of {', '.join(kinds)}.")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=160)


def cost_figure(costs: Sequence[Cost], lossless: int, title: str) -> Figure:
    """FLOPs and cache by length on logarithmic axes, full attention and AHN.

    Args:
        costs: of one model at two or more lengths, ascending.
        lossless: sinks + window, marked by a line.
        title: name of the model.
    """
    figure, (flops, cache) = new_figure(2, title)
    lengths = [cost.length for cost in costs]
    _two_lines(flops, lengths, [c.full.model_flops for c in costs], [c.ahn.model_flops for c in costs])
    _two_lines(cache, lengths, [c.full.cache_bytes for c in costs], [c.ahn.cache_bytes for c in costs])
    flops.set_title("Work to read the prompt (FLOPs)", fontsize=10, loc="left")
    cache.set_title("Cache at its end (bytes)", fontsize=10, loc="left")
    _unit_ticks(flops, 1000, ("", "K", "M", "G", "T", "P", "E", "Z"))
    _unit_ticks(cache, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    for axis in (flops, cache):
        _length_ticks(axis, lengths)
        axis.axvline(lossless, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        axis.annotate(
            f"sinks + window\n{lossless:,} tokens",
            (lossless, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=8,
            color=FULL,
        )
    flops.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


def _two_lines(axis: Any, lengths: list[int], full: list[int], ahn: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.plot(lengths, full, color=FULL, linewidth=2, label="full attention")
    axis.plot(lengths, ahn, color=AHN, linewidth=2, label="AHN")
    axis.set_xlim(lengths[0], lengths[-1])
    axis.annotate(
        f"{100 * ahn[-1] / full[-1]:.0f} %",
        (lengths[-1], ahn[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        color=AHN,
    )


def _length_ticks(axis: Any, lengths: list[int]) -> None:
    axis.set_xticks(_powers(2, lengths[0], lengths[-1]), minor=False)
    axis.xaxis.set_major_formatter(lambda value, _: _with_unit(value, 1024, ("", "K", "M", "G")))
    axis.set_xlabel("tokens")


def _unit_ticks(axis: Any, base: int, units: Sequence[str]) -> None:
    low, high = axis.get_ylim()
    axis.set_yticks(_powers(10 if base == 1000 else 2, low, high))
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda value, _: _with_unit(value, base, units))


def _powers(base: int, low: float, high: float, most: int = 9) -> list[int]:
    """At most `most` powers of `base` between two numbers, evenly apart."""
    every = [base**n for n in range(80) if low <= base**n <= high]
    return every[:: -(-len(every) // most) or 1]


def _with_unit(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < base:
            return f"{value:g} {unit}".rstrip()
        value /= base
    return f"{value:g} {units[-1]}"

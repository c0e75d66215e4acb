"""Figures. Each function returns a matplotlib figure of its own; `save` writes it. No display and no global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.costs import Cost
from ahn.errors import AHNError
from ahn.files import check_folder, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL, AHN, MUTED, INK = "#000000", "#d55e00", "#9aa3ad", "#5b6470"
"""Colours: the model as it is, the model with its memory, everything that is only there to help, bars and words."""
COLOURS = {
    "full": FULL,
    "window": MUTED,
    "gated_deltanet": "#009e73",
    "deltanet": "#cc79a7",
    "mamba2": "#56b4e9",
    "routed_deltanet": "#e69f00",
    "retained": "#0072b2",
    "bits": "#332288",
    "bits + memory": "#882255",
}
"""Of what is compared, by method or memory: the same in every figure. They are of Okabe and Ito, and two of Tol:
colour-blind readers can tell them apart."""
SPARE = (AHN, "#117733", "#7f5539", "#44aa99", "#999933", "#aa4499")
"""For what has no colour of its own, and for the second of a kind."""
DASHED = (0, (4, 3))
WIDTH = 1.8
"""Of lines, in points."""
TOUCHING = 0.01
"""Share of a panel's height by which curves may differ and still be one line to the eye: about a line's width."""
UNITS = {
    1000: ("", "K", "M", "G", "T", "P", "E", "Z"),
    1024: ("B", "KiB", "MiB", "GiB", "TiB", "PiB"),
}
TURN = 4.0
"""Length of a dash where lines coincide, in widths of a line."""
PAGE, PANEL = 7.2, 2.8
"""Width of every figure and height of a panel, in inches: a page shows a figure some 700 pixels wide, and letters of 8
points are then as large as its text's smallest."""
LETTER, HANDLE, ENTRY = 0.08, 0.62, 0.2
"""Of a legend, in inches: width of a letter, of a line with the space around it, and height of an entry."""
NUMBERED = 144
"""Cells of a heat map up to which each shows its number."""


def colours(kinds: Mapping[str, str]) -> dict[str, str]:
    """A colour for each label: that of its kind, if no label before it has it.

    Args:
        kinds: by label; see `COLOURS`.
    """
    found: dict[str, str] = {}
    spare = iter(SPARE * len(kinds))
    for label, kind in kinds.items():
        own = COLOURS.get(kind)
        found[label] = own if own is not None and own not in found.values() else next(spare)
    return found


def new_figure(panels: int, title: str, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure as wide as a page's text, and the axes of its panels.

    Args:
        panels: below each other, or row by row in `columns`.
        title: broken into lines where it is longer than the figure is wide.
    """
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    figure = Figure(figsize=(PAGE, 0.4 + PANEL * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, which="major", color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
    for axis in axes[panels:]:
        axis.set_visible(False)
    figure.suptitle(textwrap.fill(title, 80), fontsize=11)
    return figure, axes[:panels]


def finish(figure: Figure, axes: Sequence[Any], notes: Sequence[str] = ()) -> None:
    """Mark lines that coincide, and put one legend for all panels below them, where no curve is.

    Call it when all is drawn: whether lines coincide depends on the limits of the axes.

    Args:
        axes: whose lines have labels; of one label the first counts.
        notes: more lines after the legend's, such as what a shade means.
    """
    from matplotlib.lines import Line2D

    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if isinstance(handle, Line2D):  # a copy, which keeps its style when the line gets dashes
                plain = Line2D([], [])
                plain.update_from(handle)
                handle = plain
            handles.setdefault(label, handle)
    marked = [_mark_coincident(axis) for axis in axes]
    notes = [*notes, *(["dashes in turn: lines that coincide"] if any(marked) else [])]
    empty = Line2D([], [], linestyle="none")
    labels = [*handles, *notes]
    columns = max(1, int(PAGE / (HANDLE + LETTER * max(map(len, labels)))))
    figure.legend(
        [*handles.values(), *(empty for _ in notes)],
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    figure.set_figheight(figure.get_figheight() + 0.1 + ENTRY * -(-len(labels) // columns))


def heat_map(axis: Any, shares: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]) -> Any:
    """Draw percentages as colours and, where there are few, as numbers; return the picture.

    Args:
        shares: from 0 to 100, row by row; NaN where nothing was measured.
    """
    axis.grid(False)
    axis.spines[:].set_visible(False)
    image = axis.imshow(shares, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=9)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.tick_params(length=0)
    if len(columns) * len(rows) <= NUMBERED:
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                if not math.isnan(share):
                    ink = "white" if share >= 50 else FULL
                    axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=ink)
    return image


def heat_map_columns(cells: int, maps: int) -> int:
    """How many heat maps with so many cells in a row fit beside each other, their numbers readable."""
    return max(1, min(maps, 3, int(PAGE / (0.3 * cells + 0.6))))


def plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic y axis over less than two powers of ten, as numbers: 20, 50, 100."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _mark_coincident(axis: Any) -> bool:
    """Lines over the same places that lie on each other everywhere get dashes in turn, so that each is seen."""
    groups: list[list[tuple[Any, Any]]] = []
    for line in axis.get_lines():
        if line.get_label().startswith("_") or len(line.get_xdata()) < 2:
            continue
        places = axis.transData.transform(line.get_xydata()) / axis.bbox.height
        for group in groups:
            first = group[0][1]
            if first.shape == places.shape and abs(first - places).max() <= TOUCHING:
                group.append((line, places))
                break
        else:
            groups.append([(line, places)])
    groups = [group for group in groups if len(group) > 1]
    for group in groups:
        for turn, (line, _) in enumerate(group):
            gap = TURN * (len(group) - 1)
            line.set(linewidth=WIDTH, linestyle=(-TURN * turn % (TURN + gap), (TURN, gap)))
    return bool(groups)


def check(path: Path) -> None:
    """Find out, before the work, whether a figure can be written there.

    Raises:
        AHNError: the directory does not exist or cannot be written, or matplotlib cannot write this kind of file.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if _suffix(path) not in kinds:
        raise AHNError(f"Cannot write a figure as {path.name!r}; its suffix must be one of {', '.join(kinds)}.")
    if not path.parent.exists():
        raise AHNError(f"There is no directory {path.parent}.")
    check_folder(path.parent)


def _suffix(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix (png, svg, pdf) says how. The file appears whole or not at all.

    Raises:
        AHNError: as `check`.
    """
    path = Path(path)
    check(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=_suffix(path), dpi=160)


def cost_figure(costs: Sequence[Cost], lossless: int, title: str) -> Figure:
    """FLOPs and cache by length on logarithmic axes, full attention and AHN.

    Args:
        costs: of one model at two or more lengths, ascending.
        lossless: sinks + window, marked by a line.
    """
    figure, (flops, cache) = new_figure(2, title)
    lengths = [cost.length for cost in costs]
    _two_lines(flops, lengths, [c.full.model_flops for c in costs], [c.ahn.model_flops for c in costs])
    _two_lines(cache, lengths, [c.full.cache_bytes for c in costs], [c.ahn.cache_bytes for c in costs])
    flops.set_title("Work to read the prompt (FLOPs)", fontsize=10, loc="left")
    cache.set_title("Cache at its end (bytes)", fontsize=10, loc="left")
    unit_ticks(flops, 1000)
    unit_ticks(cache, 1024)
    for axis in (flops, cache):
        _length_ticks(axis, lengths)
        axis.axvline(lossless, color=MUTED, linestyle=DASHED, linewidth=1)
        axis.annotate(
            f"sinks + window\n{lossless:,} tokens",
            (lossless, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    finish(figure, [flops])
    return figure


def _two_lines(axis: Any, lengths: list[int], full: list[int], ahn: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.plot(lengths, full, color=FULL, linewidth=WIDTH, label="full attention")
    axis.plot(lengths, ahn, color=AHN, linewidth=WIDTH, label="AHN")
    axis.set_xlim(lengths[0], lengths[-1])
    end_value(axis, lengths[-1], ahn[-1], f"{100 * ahn[-1] / full[-1]:.0f} %", AHN)


def end_value(axis: Any, x: float, y: float, text: str, colour: str) -> None:
    """A number right of where a line ends."""
    axis.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10, color=colour)


def _length_ticks(axis: Any, lengths: list[int]) -> None:
    axis.set_xticks(_powers(2, lengths[0], lengths[-1]), minor=False)
    axis.xaxis.set_major_formatter(lambda value, _: _with_unit(value, 1024, ("", "K", "M", "G")))
    axis.set_xlabel("tokens")


def unit_ticks(axis: Any, base: int) -> None:
    """Ticks of a logarithmic y axis in units: 10 G, 100 G, 1 T with a base of 1000, 64 MiB, 1 GiB with one of 1024."""
    units = UNITS[base]
    low, high = axis.get_ylim()
    axis.set_yticks([float(power) for power in _powers(10 if base == 1000 else 2, low, high)])
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda value, _: _with_unit(value, base, units))


def _powers(base: int, low: float, high: float) -> list[int]:
    """At most nine powers of `base` between two numbers, evenly apart."""
    every = [base**n for n in range(80) if low <= base**n <= high]
    return every[:: -(-len(every) // 9) or 1]


def _with_unit(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < base:
            return f"{value:g} {unit}".rstrip()
        value /= base
    return f"{value:g} {units[-1]}"

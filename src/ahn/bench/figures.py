"""The story in one look: time and memory by length, throughput by batch. Full attention grows, an AHN does not."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ahn.bench.methods import DYNAMIC, STATIC, WINDOW
from ahn.bench.records import OK, OUT_OF_MEMORY, Row
from ahn.bench.table import tokens
from ahn.measure.plots import WIDTH, colours, finish, new_figure

KINDS = {DYNAMIC: "full", WINDOW: "window"}
"""Of `ahn.measure.plots.COLOURS`, where a method's name is none."""
LOGARITHMIC = 50
"""Ratio of the largest to the smallest value beyond which small ones would vanish on a linear axis."""
Panel = tuple[str, str, str, float]
LENGTH_PANELS: tuple[Panel, ...] = (
    ("prefill", "Reading the prompt (s)", "seconds", 1.0),
    ("decode", "One more token (ms)", "seconds", 1e3),
    ("memory", "Peak memory (GB)", "peak_bytes", 1e-9),
)
BATCH_PANELS: tuple[Panel, ...] = (
    ("throughput", "Tokens per second, all conversations", "tokens_per_second", 1.0),
    ("throughput", "Peak memory (GB)", "peak_bytes", 1e-9),
)


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures by file name (without suffix), for each model and device among the rows."""
    drawn: dict[str, Figure] = {}
    subjects = list(dict.fromkeys((row["model"], row["device"]) for row in rows))
    for model, device in subjects:
        own = [row for row in rows if (row["model"], row["device"]) == (model, device)]
        suffix = "" if len(subjects) == 1 else f"-{model}-{device.replace(' ', '-')}"
        lengths = _series(own, LENGTH_PANELS, "context", one_batch=True)
        if lengths:
            drawn[f"length{suffix}"] = _figure(f"{model} on {device}", lengths, "tokens of context")
        batches = _series(own, BATCH_PANELS, "batch", one_batch=False)
        if batches:
            drawn[f"throughput{suffix}"] = _figure(f"{model} on {device}", batches, "conversations")
    return drawn


Points = list[tuple[float, float]]


@dataclasses.dataclass
class Curve:
    """One method in one panel.

    Attributes:
        spans: fastest and slowest of the runs whose median a point is, where they are known.
        limits: the machine's, at the same places.
        ran_out: memory did, at the next place.
    """

    points: Points
    spans: list[tuple[float, float, float]]
    limits: Points
    ran_out: bool = False


Series = dict[str, Curve]


def _series(rows: Sequence[Row], panels: Sequence[Panel], x: str, one_batch: bool) -> list[tuple[Panel, Series]]:
    """The panels that have something to show, with curves by method."""
    found = []
    for panel in panels:
        measurement, _, y, scale = panel
        of_kind = [row for row in rows if row["measurement"] == measurement and row.get("context")]
        fixed, value = ("batch", 1) if one_batch else ("context", max((r["context"] for r in of_kind), default=0))
        series: Series = {}
        for row in sorted((row for row in of_kind if row[fixed] == value), key=lambda row: row[x]):
            curve = series.setdefault(row["method"], Curve([], [], []))
            if row["status"] == OUT_OF_MEMORY:
                curve.ran_out = True
            elif row["status"] == OK and row.get(y) is not None:
                curve.points.append((row[x], row[y] * scale))
                if y == "seconds":
                    times = row.get("times_s") or row.get("generate_times_s") or [row[y]]
                    curve.spans.append((row[x], min(times) * scale, max(times) * scale))
                    curve.limits.append((row[x], row["limit_s"] * scale))
        if series := {name: curve for name, curve in series.items() if curve.points}:
            found.append((panel, series))
    return found


def _figure(title: str, panels: list[tuple[Panel, Series]], x_label: str) -> Figure:
    figure, axes = new_figure(len(panels), title)
    names = [name for _, series in panels for name in series]
    own = colours({name: KINDS.get(name, name) for name in names})
    for axis, ((_, heading, _, _), series) in zip(axes, panels, strict=True):
        memories = [name for name in series if name not in (DYNAMIC, STATIC, WINDOW)]
        for name, curve in series.items():
            _draw(axis, name, curve, own[name], limit=name in (DYNAMIC, *memories[:1]))
        axis.set_title(heading, fontsize=10, loc="left")
        _axes(axis, series, x_label)
    spans = any(curve.spans for _, series in panels for curve in series.values())
    finish(figure, axes, ["points: median of the runs", "bars: fastest to slowest run"] if spans else [])
    return figure


def _draw(axis: Any, name: str, curve: Curve, colour: str, limit: bool) -> None:
    axis.plot(*zip(*curve.points, strict=True), color=colour, label=name, linewidth=WIDTH, marker="o", markersize=4)
    if curve.spans:
        axis.vlines(*zip(*curve.spans, strict=True), color=colour, linewidth=5, alpha=0.25)
    if limit and curve.limits:
        axis.plot(*zip(*curve.limits, strict=True), color=colour, linewidth=1, linestyle=":", label=f"limit, {name}")
    if curve.ran_out:
        offset = {"xytext": (6, 4), "textcoords": "offset points"}
        axis.annotate("out of memory", curve.points[-1], fontsize=8, color=colour, **offset)


def _axes(axis: Any, series: Series, label: str) -> None:
    places = sorted({x for curve in series.values() for x, _ in curve.points})
    heights = [y for curve in series.values() for _, y in curve.points]
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [tokens(int(place)) for place in places])
    axis.set_xticks([], minor=True)
    if max(heights) > LOGARITHMIC * min(heights) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(label)

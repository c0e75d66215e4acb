"""Figures of a report: heat maps of needles, curves by length, and the paper's figure 3."""

import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ahn.evaluation.report.collect import Column, ResultTable, Row, StoredResult
from ahn.evaluation.tasks.generated import tokens_of
from ahn.measure.plots import (
    AHN,
    DASHED,
    MUTED,
    NUMBERED,
    WIDTH,
    colours,
    finish,
    heat_map,
    heat_map_columns,
    new_figure,
    plain_numbers,
    unit_ticks,
)

LINES = {"ct-max": "--", "ct-avg": ":"}
"""Baselines that are grey, as sinks + window is, and told apart by their lines."""

Group = Sequence[tuple[Row, StoredResult]]


def heat_maps(title: str, group: Group) -> Figure:
    """Scores by depth and length, one map per row; the line is where a needle leaves the window."""
    lengths = sorted({cell["length"] for _, result in group for cell in result.figures["grid"]})
    depths = sorted({cell["depth"] for _, result in group for cell in result.figures["grid"]})
    samples = [cell.get("samples") for _, one in group for cell in one.figures["grid"]]
    counted = f": {samples[0]} texts in each cell" if samples.count(samples[0]) == len(samples) else ""
    columns = heat_map_columns(len(lengths), len(group))
    figure, axes = new_figure(len(group), title + counted, columns)
    figure.set_figheight(1 + (0.6 + 0.23 * len(depths)) * -(-len(group) // columns))
    for place, (axis, (row, result)) in enumerate(zip(axes, group, strict=True)):
        image = _heat_map(axis, row, result, lengths, depths)
        if place % columns:
            axis.set_yticks([])
    figure.supxlabel("tokens of the text (below the orange line the needle is in the window)", fontsize=9)
    figure.supylabel("depth of the needle (%)", fontsize=9)
    if len(lengths) * len(depths) > NUMBERED:
        figure.colorbar(image, ax=axes, shrink=0.6, label="found (%)").outline.set_visible(False)
    return figure


def _heat_map(axis: Any, row: Row, result: StoredResult, lengths: list[int], depths: list[float]) -> Any:
    cells = {(cell["length"], cell["depth"]): cell["score"] for cell in result.figures["grid"]}
    grid = [[cells.get((length, depth), math.nan) for length in lengths] for depth in depths]
    image = heat_map(axis, grid, list(map(_tokens, lengths)), [f"{depth:g}" for depth in depths])
    axis.set_title(f"{row.label}: {result.figures['score']:.1f} %", fontsize=10, loc="left")
    if row.settings.get("window"):
        _window_edge(axis, row.settings["window"], lengths, depths)
    return image


def _window_edge(axis: Any, window: int, lengths: list[int], depths: list[float]) -> None:
    """A step line above the depths that are still inside the window when a needle is asked for."""
    edges = []
    for length in lengths:
        depth = 100 * (1 - window / length)
        edges.append(sum(other < depth for other in depths) - 0.5)
    xs = [x for n in range(len(lengths)) for x in (n - 0.5, n + 0.5)]
    ys = [edge for edge in edges for _ in (0, 1)]
    axis.plot(xs, ys, color=AHN, linewidth=1.4)


def by_length(benchmark: str, comparison: ResultTable) -> Figure | None:
    """Mean score of a benchmark's tasks by the length in their names; None with fewer than two lengths."""
    levels: dict[int, list[Column]] = {}
    for column in comparison.columns:
        found = re.fullmatch(rf"{benchmark}/[^/]+/(\d{{1,9}}k?)", column.label)
        if found:
            levels.setdefault(tokens_of(found[1]), []).append(column)
    if len(levels) < 2:
        return None
    texts = sorted({column.samples for columns in levels.values() for column in columns if column.samples})
    of = f"{texts[0]}" if texts[:1] == texts else f"{texts[0]} to {texts[-1]}"
    figure, (axis,) = new_figure(1, f"{benchmark}: mean over tasks of {of} texts, by length")
    own = row_colours(comparison.rows)
    for row in comparison.rows:
        # Only lengths at which this row has every task: means over different tasks are no curve.
        points = {
            length: [column.scores[row.label] for column in columns]
            for length, columns in sorted(levels.items())
            if all(row.label in column.scores for column in columns)
        }
        if points:
            means = [sum(scores) / len(scores) for scores in points.values()]
            axis.plot(list(points), means, marker="o", markersize=4, **_style(row, own))
            ends = list(map(min, points.values())), list(map(max, points.values()))
            axis.vlines(list(points), *ends, color=own[row.label], linewidth=5, alpha=0.25)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(levels), [_tokens(length) for length in sorted(levels)], minor=False)
    axis.set_xlabel("tokens")
    axis.set_ylabel("score (%)")
    axis.set_ylim(bottom=0)
    finish(figure, [axis], ["bars: lowest to highest task"])
    return figure


def long_document(title: str, group: Group) -> Figure:
    """The paper's figure 3: FLOPs and cache by length (computed), perplexity and peak memory by position (measured).

    Text differs more from page to page than methods do, so perplexity is also shown as a share of a baseline's.
    """
    baseline = next((result.lines("positions.jsonl") for row, result in group if row.kind == "window"), None)
    titles = (
        "(a) work to read a text of this length (FLOPs, computed)",
        "(b) cache at its end (computed)",
        "(c) perplexity by position (smoothed)",
        "(d) peak memory beyond the model (MiB)",
        "(e) perplexity as a share of sinks + window's (smoothed)",
    )[: 4 + (baseline is not None)]
    figure, axes = new_figure(len(titles), f"{title} (1 text)")
    own = row_colours([row for row, _ in group])
    for row, result in group:
        style = _style(row, own)
        costs, buckets = result.lines("cost.jsonl"), result.lines("positions.jsonl")
        lengths = [cost["length"] for cost in costs]
        axes[0].plot(lengths, [cost["flops"] for cost in costs], **style)
        axes[1].plot(lengths, [cost["cache_bytes"] for cost in costs], **style)
        axes[2].plot(*_smoothed(buckets, [bucket["loss"] for bucket in buckets]), **style)
        peaks = [bucket["peak_bytes"] for bucket in buckets]
        if None not in peaks:
            axes[3].plot([bucket["stop"] for bucket in buckets], [peak / 2**20 for peak in peaks], **style)
        if baseline is not None:
            both = list(zip(buckets, baseline, strict=False))
            gain = [mine["loss"] - other["loss"] for mine, other in both if mine["stop"] == other["stop"]]
            axes[4].plot(*_smoothed(buckets[: len(gain)], gain), **style)
    for axis, text in zip(axes, titles, strict=True):
        axis.set_title(text, fontsize=10, loc="left")
    for axis, base in zip(axes[:2], (1000, 1024), strict=True):
        _length_axis(axis, lengths)
        unit_ticks(axis, base)
    edge = max((row.settings.get("window") or 0) + (row.settings.get("sinks") or 0) for row, _ in group)
    for axis in axes[2:]:
        _position_axis(axis, max(result.figures["tokens"] for _, result in group), edge)
    axes[2].set_yscale("log")
    plain_numbers(axes[2])
    axes[3].set_ylim(bottom=0)
    if baseline is not None:
        axes[4].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    finish(figure, axes, ["dashed, upright: end of sinks + window"] if edge else [])
    return figure


def _length_axis(axis: Any, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths[::2], [_tokens(length) for length in lengths[::2]], minor=False)
    axis.set_xlabel("length (tokens)")


def _position_axis(axis: Any, longest: int, edge: int) -> None:
    step = 1 << max(0, math.ceil(math.log2(longest / 8)))
    axis.set_xlim(0, longest)
    axis.set_xticks(range(0, longest + 1, step), [_tokens(tick) for tick in range(0, longest + 1, step)])
    axis.set_xlabel("position in the document (tokens)")
    if edge:
        axis.axvline(edge, color=MUTED, linestyle=DASHED, linewidth=1)


def _smoothed(buckets: Sequence[dict[str, Any]], losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """Centres of buckets and the exponential of a moving mean of losses, over a 16th of the document."""
    span = max(1, len(buckets) // 16)
    xs, ys = [], []
    for end in range(span, len(buckets) + 1):
        xs.append((buckets[end - span]["start"] + buckets[end - 1]["stop"]) / 2)
        ys.append(math.exp(sum(losses[end - span : end]) / span))
    return xs, ys


def row_colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each row's label: that of its kind, if no row before it has it."""
    own = colours({row.label: row.kind for row in rows if row.kind not in LINES})
    return own | {row.label: MUTED for row in rows if row.kind in LINES}


def _style(row: Row, own: dict[str, str]) -> dict[str, Any]:
    line = {"linestyle": LINES[row.kind]} if row.kind in LINES else {}
    return {"color": own[row.label], "linewidth": WIDTH, "label": row.label} | line


def _tokens(number: int) -> str:
    """1536 as 1.5k, 2048 as 2k."""
    if number >= 1 << 20:
        return f"{number / (1 << 20):.3g}M"
    return f"{number / 1024:.3g}k" if number >= 1024 else str(number)

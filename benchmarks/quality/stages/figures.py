"""The figures of the report, in the style and the colours of `ahn.measure.plots`.

`won_back` and `ablations` need losses of single sequences, which only the folder of a run has; `redraw.py` draws the
others from the rows in benchmarks/results.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.measure import plots
from ahn.measure.intervals import wilson
from ahn.measure.plots import DASHED, MUTED, WIDTH, finish, heat_map, heat_map_columns, new_figure, save

from .rows import FULL, WINDOW, Group, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = ("gated_deltanet", "deltanet", "mamba2", "routed_deltanet", "bits", "bits + memory", "retained")
COLOURS = (*(plots.COLOURS[name] for name in _NAMED), plots.AHN)
MARKERS = "D^vPpXso*"
FIXED = {FULL: (plots.FULL, "-"), WINDOW: (MUTED, "-"), "ct_max": (MUTED, "--"), "ct_avg": (MUTED, ":")}
"""Colour and line of what has no parameters: no marks, so that the others stand out."""
SHADE = "shade: lowest to highest seed"
NAMES = {
    FULL: "full attention",
    WINDOW: "sinks + window",
    "ct_max": "CT-max",
    "ct_avg": "CT-avg",
    "gated_deltanet": "Gated DeltaNet",
    "routed_deltanet": "Routed DeltaNet",
    "deltanet": "DeltaNet",
    "mamba2": "Mamba2",
    "-long": ", 1,000 steps",
    "+": ", ",
}
"""What the parts of a method's name are called in a figure."""


def draw(results: Results, folder: Path) -> list[str]:
    """Draw every figure that there are numbers for; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    whole = all("chunk_losses" in row for group in results.groups for row in group.seeds)
    for function in (cost, recall, positions, repeats, far, needles, *((won_back, ablations) if whole else ())):
        figure = function(results)
        if figure is not None:
            save(figure, folder / f"{function.__name__}.png")
            drawn.append(function.__name__)
    return drawn


def cost(results: Results) -> Figure | None:
    """Loss above full attention's and facts recalled by bytes of the cache, a line per method, a mark per budget.

    Both are of tokens and facts that lie beyond the largest budget, so that all marks measure the same.
    """
    context, most = results.places(far=False)[-1]
    kept = ", ".join(str(budget) for length, budget in results.places(far=False) if length == context)
    title = f"Loss and facts by bytes of the cache; {kept} tokens kept of {context}, {_texts(results, context)}"
    figure, (losses, facts) = new_figure(2, title)
    for method in _methods(results, baselines=True):
        groups = [group for group in results.groups if group.method == method and group.context == context]
        if method != FULL and groups:
            kib = [group.cache_bytes / 1024 for group in groups]
            style = _style(results, groups[0])
            seeds = [[dataclasses.replace(group, seeds=[row]) for row in group.seeds] for group in groups]
            for axis, value in ((losses, _loss), (facts, _recalled)):
                axis.plot(kib, [value(group, most) for group in groups], **style)
                single = [[value(group, most) for group in each] for each in seeds]
                axis.vlines(kib, list(map(min, single)), list(map(max, single)), color=style["color"], linewidth=WIDTH)
    losses.set_ylabel("nats above full attention")
    facts.set_ylabel("% recalled")
    losses.set_title(f"Loss from token {most} on (lower is better)", fontsize=10, loc="left")
    facts.set_title(f"Facts stated {most} tokens ago or earlier", fontsize=10, loc="left")
    for axis in (losses, facts):
        axis.set_ylim(bottom=0)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("cache at the end (KiB)")
    finish(figure, [losses, facts], ["upright: lowest to highest seed"])
    return figure


def won_back(results: Results) -> Figure | None:
    """Share of the gap won back with intervals, a panel per budget."""
    places = results.places(far=False)
    figure, axes = new_figure(len(places), "Loss won back between sinks + window (0 %) and full attention (100 %)")
    figure.set_figheight(0.4 + (1.2 + 0.36 * len(_methods(results))) * len(places))
    for axis, (context, budget) in zip(axes, places, strict=True):
        groups = [group for group in results.at(context, budget) if group.method in _methods(results)]
        for place, group in enumerate(groups):
            colour = _style(results, group)["color"]
            for row in group.seeds if len(group.seeds) > 1 else []:
                axis.plot(100 * group.won_back(row)[0], place + 0.22, "|", color=colour, markersize=7)
            _whisker(axis, [100 * number for number in group.won_back()], place, colour)
        _names(axis, [group.method for group in groups])
        axis.axvline(0, color=MUTED, linewidth=1)
        several = any(len(group.seeds) > 1 for group in groups)
        axis.set_xlabel("% won back" + ("; ticks below: single seeds" if several else ""))
        axis.set_title(f"{budget} tokens kept, {context} read", fontsize=10, loc="left")
    return figure


def recall(results: Results) -> Figure | None:
    """Facts recalled by distance, a panel per budget."""
    places = results.places(far=False)
    asked = sum(number for _, number in results.at(*places[0])[0].first["recall"].values())
    figure, axes = new_figure(len(places), f"Facts recalled, by how long ago they were stated: {asked:,} facts")
    for axis, (context, budget) in zip(axes, places, strict=True):
        groups = _shown(results, context, budget)
        buckets = list(groups[0].first["recall"])
        edges = [*map(int, buckets), context]
        for number, group in enumerate(groups):
            shares = np.array([hits / asked for hits, asked in map(group.recall, buckets)])
            lows, highs = np.array([wilson(*group.recall(bucket)) for bucket in buckets]).T
            x, style = np.arange(len(buckets)) + 0.07 * (number - len(groups) / 2), _style(results, group)
            axis.plot(x, 100 * shares, **style)
            axis.vlines(x, 100 * lows, 100 * highs, color=style["color"], linewidth=1)
        axis.axhline(100 * groups[0].first["recall_chance"], color=MUTED, linestyle=":", linewidth=1)
        axis.set_xticks(range(len(buckets)), [f"≤{_short(high)}" for high in edges[1:]])
        axis.axvline(sum(edge <= budget for edge in edges[1:]) - 0.5, color=MUTED, linestyle=DASHED, linewidth=1)
        axis.set_xlabel("tokens ago")
        axis.set_ylabel("% recalled")
        axis.set_title(f"{budget} tokens kept, {context} read", fontsize=10, loc="left")
    notes = ["upright: 95 % intervals over facts", "dashed, upright: tokens kept", "dotted, level: chance"]
    finish(figure, axes, notes)
    return figure


def positions(results: Results) -> Figure | None:
    """Loss above full attention's by position in the text, a panel per budget."""
    places = results.places(far=False)
    title = f"Loss above full attention's, by position (lower is better): {_texts(results, places[0][0])}"
    figure, axes = new_figure(len(places), title)
    for axis, (context, budget) in zip(axes, places, strict=True):
        _by_position(results, axis, context, budget)
    finish(figure, axes, [SHADE])
    return figure


def far(results: Results) -> Figure | None:
    """Loss by position in long texts, beyond what the base model was trained for, a panel per length."""
    places = results.places(far=True)
    if not places:
        return None
    figure, axes = new_figure(len(places), "Loss by position in long texts (lower is better)")
    for axis, (context, budget) in zip(axes, places, strict=True):
        _by_position(results, axis, context, budget, above=False)
    finish(figure, axes, [SHADE])
    return figure


def repeats(results: Results) -> Figure | None:
    """Loss above full attention's by how long ago a pair of tokens was last seen, a panel per budget."""
    places = results.places(far=False)
    title = "Loss above full attention's, by how long ago the token last followed the same token "
    title += f"(lower is better): {_texts(results, places[0][0])}"
    figure, axes = new_figure(len(places), title)
    for axis, (context, budget) in zip(axes, places, strict=True):
        groups = _shown(results, context, budget)
        names = [name for name in groups[0].full["loss_by_repeat"]]
        base = np.array([groups[0].full["loss_by_repeat"][name][0] for name in names])
        for group in groups:
            losses = np.array([[row["loss_by_repeat"][name][0] for name in names] for row in group.seeds]) - base
            _with_range(axis, range(len(names)), losses, _style(results, group))
        highs = [*names[2:], str(context)]
        axis.set_xticks(range(len(names)), ["never", *[f"≤{_short(int(high))}" for high in highs]])
        axis.set_xlabel("tokens ago")
        axis.set_ylabel("nats per token")
        axis.set_title(f"{budget} tokens kept, {context} read", fontsize=10, loc="left")
    finish(figure, axes, [SHADE])
    return figure


def needles(results: Results) -> Figure | None:
    """Single facts found, by length of the text and depth of the fact: a map per method, at the middle budget."""
    budgets = sorted({budget for _, budget in results.places(far=False)})
    budget = budgets[len(budgets) // 2]
    cells = {method: dict(_cells(results, method, budget)) for method in _methods(results, baselines=True)}
    cells = {method: found for method, found in cells.items() if found}
    if not cells:
        return None
    lengths = sorted({length for found in cells.values() for length, _ in found})
    depths = sorted({depth for found in cells.values() for _, depth in found})
    columns = heat_map_columns(len(lengths), len(cells))
    asked = [group.needles(length, depth)[1] for group in results.groups if group.budget == budget
             for length, grid in group.first["needles"].items() for depth in grid]  # fmt: skip
    texts = (
        f"{min(asked)} to {max(asked)} texts in each cell" if len(set(asked)) > 1 else f"{asked[0]} texts in each cell"
    )
    figure, axes = new_figure(len(cells), f"% of single facts found, {budget} tokens kept exactly: {texts}", columns)
    figure.set_figheight(1 + (0.4 + 0.25 * len(depths)) * -(-len(cells) // columns))
    for number, (axis, (method, found)) in enumerate(zip(axes, cells.items(), strict=True)):
        grid = [[100 * found.get((length, depth), np.nan) for length in lengths] for depth in depths]
        heat_map(axis, grid, list(map(_short, lengths)), [f"{100 * depth:.0f}" for depth in depths])
        if number % columns:
            axis.set_yticks([])
        axis.set_title(_name(method), fontsize=10)
    figure.supylabel("stated at % of the text", fontsize=9)
    figure.supxlabel("tokens of text before the question", fontsize=9)
    return figure


def ablations(results: Results) -> Figure | None:
    """Differences in loss and KL to the same memory trained as the recipe says."""
    pairs = results.pairs()
    if not pairs:
        return None
    budgets = sorted({group.budget for group, _ in pairs})
    names = list(dict.fromkeys(group.method for group, _ in pairs))
    texts = _texts(results, pairs[0][0].context)
    figure, axes = new_figure(2, f"Trained in other ways: difference to the recipe's own (positive is worse): {texts}")
    figure.set_figheight(0.4 + 2 * (1.2 + 0.45 * len(names)))
    for axis, key, title in zip(axes, ("chunk_losses", "chunk_kl"), ("loss", "KL from full attention"), strict=True):
        for group, reference in pairs:
            number = budgets.index(group.budget)
            place = names.index(group.method) + 0.22 * (number - (len(budgets) - 1) / 2)
            difference = [1000 * part for part in group.minus(reference, key)]
            label = f"{group.budget} kept" if group.method == names[0] else None
            _whisker(axis, difference, place, COLOURS[number], MARKERS[number], label)
        _names(axis, names)
        axis.axvline(0, color=MUTED, linewidth=1)
        axis.set_xlabel("thousandths of a nat per token")
        axis.set_title(title, fontsize=10, loc="left")
    finish(figure, axes, ["lines: 95 % intervals"])
    return figure


def _loss(group: Group, first: int) -> float:
    return group.loss_above_full(first)


def _recalled(group: Group, first: int) -> float:
    return 100 * group.recalled_from(first)


def _texts(results: Results, context: int) -> str:
    """How many texts of this length were read; losses are of the tokens beyond the budget in each."""
    group = next(group for group in results.groups if group.context == context)
    tokens = sum(number for _, number in group.full["loss_by_repeat"].values())
    return f"{round(tokens / (context - group.budget))} texts"


def _with_range(axis: Any, x: Sequence[float], seeds: np.ndarray, style: dict[str, Any]) -> None:
    """The mean over seeds (S, N) as a line, and their range as a shade."""
    axis.plot(x, seeds.mean(0), **style)
    if len(seeds) > 1:
        axis.fill_between(x, seeds.min(0), seeds.max(0), color=style["color"], alpha=0.2, linewidth=0)


def _by_position(results: Results, axis: Any, context: int, budget: int, above: bool = True) -> None:
    top = 0.0
    for group in _shown(results, context, budget):
        rows = np.array([row["loss_by_position"] for row in group.seeds])
        losses = rows - (np.array(group.full["loss_by_position"]) if above else 0)
        middle = (np.arange(losses.shape[1]) + 0.5) * group.first["position_size"]
        _with_range(axis, middle, losses, _style(results, group) | {"markersize": 3})
        top = max(top, losses.max() if group.method != FULL else 0.0)
    low = axis.get_ylim()[0]
    axis.set_ylim(low, top + 0.08 * (top - low))  # full attention may leave it beyond the lengths that the base knows
    axis.set_xticks(range(0, context + 1, context // 4), [_short(part * context / 4) for part in range(5)])
    axis.set_xlabel("position in the text, tokens")
    axis.set_ylabel("nats per token")
    axis.set_title(f"{budget} tokens kept, {context} read", fontsize=10, loc="left")


def _methods(results: Results, baselines: bool = False) -> list[str]:
    """What the figures compare: no ablations; full attention and sinks + window if `baselines`."""
    names = dict.fromkeys(group.method for group in results.groups)
    left_out = () if baselines else (FULL, WINDOW)
    return [name for name in names if results.stands_alone(name) and name not in left_out]


def _shown(results: Results, context: int, budget: int) -> list[Group]:
    shown = _methods(results, baselines=True)
    return [group for group in results.at(context, budget) if group.method in shown]


def _cells(results: Results, method: str, budget: int) -> Iterator[tuple[tuple[int, float], float]]:
    """Share of needles found by (length, depth)."""
    for group in results.groups:
        if (group.method, group.budget) == (method, budget):
            for length, grid in group.first["needles"].items():
                for depth in grid:
                    hits, asked = group.needles(length, depth)
                    yield (int(length), float(depth)), hits / asked


def _style(results: Results, group: Group) -> dict[str, Any]:
    """Colour, mark and name of a method, the same in every figure. One memory has one colour, however trained."""
    name = {"label": _name(group.method)}
    if group.method in FIXED:
        colour, line = FIXED[group.method]
        return name | {"color": colour, "linestyle": line, "linewidth": WIDTH, "marker": ""}
    alike = results.reference(group.method) or group.method
    kinds = [results.reference(method) or method for method in _methods(results) if method not in FIXED]
    number = list(dict.fromkeys(kinds)).index(alike)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    changed = {"linestyle": "--", "markerfacecolor": "white"} if alike != group.method else {}
    return name | {"color": colour, "linewidth": WIDTH, "marker": marker, "markersize": 5} | changed


def _whisker(
    axis: Any, number: Sequence[float], place: float, colour: str, marker: str = "o", label: str | None = None
) -> None:
    value, low, high = number
    axis.plot([low, high], [place, place], color=colour, linewidth=1.6)
    axis.plot(value, place, marker, color=colour, markersize=6, label=label)


def _name(method: str) -> str:
    return re.sub("|".join(map(re.escape, NAMES)), lambda part: NAMES[part[0]], method)


def _names(axis: Any, methods: Sequence[str]) -> None:
    axis.set_yticks(range(len(methods)), [_name(method) for method in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"

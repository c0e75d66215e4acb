"""What every figure has in common: width, colours, one legend below the panels, and lines that coincide are seen."""

from __future__ import annotations

import pytest

from ahn.measure import plots


def test_each_kind_has_its_colour_and_its_second_another() -> None:
    found = plots.colours({"a": "deltanet", "b": "deltanet", "c": "what nobody knows", "d": "full"})
    assert found["a"] == plots.COLOURS["deltanet"] and found["d"] == plots.FULL
    assert len(set(found.values())) == 4


def test_lines_that_coincide_take_turns_and_the_legend_says_so() -> None:
    figure, (axis,) = plots.new_figure(1, "title")
    for name, ys in {"one": [0, 2, 4], "two": [0, 2, 4.01], "apart": [0, 2, 3], "three": [0, 2, 4]}.items():
        axis.plot([0, 1, 2], ys, label=name)
    plots.finish(figure, [axis], ["a note"])
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["apart"].get_linestyle() == "-"
    turns = {lines[name]._unscaled_dash_pattern for name in ("one", "two", "three")}
    dash, gap = plots.TURN, 2 * plots.TURN
    assert {pattern for _, pattern in turns} == {(dash, gap)}, "each is seen a third of the way"
    assert {offset for offset, _ in turns} == {0, dash, 2 * dash}
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["one", "two", "apart", "three", "a note", "dashes in turn: lines that coincide"]
    assert [handle.get_linestyle() for handle in legend.legend_handles[:4]] == ["-"] * 4
    figure.draw_without_rendering()
    assert legend.get_window_extent().y1 <= axis.bbox.y0, "it hides no curve"


def test_lines_that_only_meet_stay_as_they_are() -> None:
    figure, (axis,) = plots.new_figure(1, "title")
    axis.plot([0, 1, 2], [0, 1, 0], label="one")
    axis.plot([0, 1, 2], [0, 1, 2], label="two")
    axis.plot([0, 1], [0, 1], label="shorter")
    plots.finish(figure, [axis])
    assert [line.get_linestyle() for line in axis.get_lines()] == ["-"] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "shorter"]


@pytest.mark.parametrize(("count", "letters"), [(1, 5), (13, 30), (40, 8), (3, 60)])
def test_a_figure_is_as_wide_as_a_page_and_holds_its_legend_and_title(count: int, letters: int) -> None:
    """Else a page shows it smaller, and its letters with it."""
    figure, axes = plots.new_figure(3, "a word " * 30)
    for axis in axes:
        for n in range(count):
            axis.plot([0, 1], [n, 2 * n], label=f"{n}".ljust(letters, "n"))
    plots.finish(figure, axes, ["a note"])
    figure.draw_without_rendering()
    assert figure.get_figwidth() == plots.PAGE
    for part in (figure.legends[0], figure._suptitle):
        box = part.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
    assert all(axis.bbox.height >= 72 for axis in axes), "a panel is at least an inch high"


def test_heat_maps_stand_beside_each_other_while_their_numbers_are_readable() -> None:
    assert [plots.heat_map_columns(cells, 5) for cells in (3, 6, 9, 40)] == [3, 3, 2, 1]
    assert plots.heat_map_columns(3, 2) == 2
    _, axes = plots.new_figure(2, "title", columns=2)
    plots.heat_map(axes[0], [[0.0, 100.0], [float("nan"), 49.6]], ["1k", "2k"], ["10", "90"])
    plots.heat_map(axes[1], [[0.0] * 13] * 12, [""] * 13, [""] * 12)
    assert [text.get_text() for text in axes[0].texts] == ["0", "100", "50"]
    assert not axes[1].texts


def test_ticks_are_numbers_with_units_and_no_markup() -> None:
    figure, (flops, size, loss) = plots.new_figure(3, "title")
    for axis, values in ((flops, [1e9, 1e15]), (size, [2**20, 2**33]), (loss, [30, 400])):
        axis.plot([0, 1], values)
        axis.set_yscale("log")
    plots.unit_ticks(flops, 1000)
    plots.unit_ticks(size, 1024)
    plots.plain_numbers(loss)
    figure.draw_without_rendering()
    shown = [[label.get_text() for label in axis.get_yticklabels()] for axis in (flops, size, loss)]
    assert "1 T" in shown[0] and "1 GiB" in shown[1] and "100" in shown[2]
    assert not [text for texts in shown for text in texts if "$" in text]

"""Tables of rows with several seeds, from numbers that were made up."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import redraw
from stages import figures
from stages.intervals import bootstrap
from stages.recipe import Context, Run
from stages.recipes import STUDY
from stages.report import report
from stages.rows import Results

SOURCES = [f"document{n // 2}" for n in range(12)]
DOCUMENTS = np.linspace(-0.05, 0.05, 12)
RECIPE = dataclasses.replace(
    STUDY,
    contexts=(Context(512, (128,), chunks=12, texts=1, needle_lengths=(256,), trials=1),),
    runs=(
        Run("deltanet", seeds=(0, 1, 2)),
        Run("deltanet-ce", {"memory": "deltanet"}, {"loss": "ce"}, seeds=(0, 1, 2)),
        Run("deltanet-router", {"memory": "deltanet", "router": True}),
    ),
)
WINS = {"deltanet": (0.20, 0.26, 0.38), "deltanet-ce": (0.10, 0.16, 0.28), "deltanet-router": (0.19,)}
"""Nats below sinks + window, a seed."""
HITS = {"deltanet": (10, 20, 60), "deltanet-ce": (10, 10, 10), "deltanet-router": (5,)}


def row(method: str, seed: int | None, loss: float, kl: float, hits: int) -> dict[str, Any]:
    losses = (loss + DOCUMENTS).tolist()
    return {
        "method": method, "seed": seed, "context": 512, "budget": 128, "sinks": 16, "window": 112, "slots": 0,
        "quantized": 0, "parameters": 5, "kv_bytes": 2048, "quantized_bytes": 0, "state_bytes": 1024, "gate_bytes": 0,
        "loss": float(np.mean(losses)), "kl": kl, "sources": SOURCES, "chunk_losses": losses, "chunk_kl": [kl] * 12,
        "position_size": 256, "loss_by_position": [loss, loss], "loss_by_repeat": {"none": [loss, 3], "0": [loss, 3]},
        "recall": {"0": [hits, 100], "256": [hits, 100]}, "recall_beyond": [hits, 100], "recall_chance": 0.01,
        "needles": {"256": {"0.5": [1, 1]}},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "prepare.json").write_text(json.dumps({"held_out_tokens": {"a": 1}, "train_tokens": 1}))
    rows = {"full": [row("full", None, 1.0, 0.0, 100)], "window_only": [row("window_only", None, 2.0, 0.5, 1)]}
    for method, wins in WINS.items():
        for seed, (win, hits) in enumerate(zip(wins, HITS[method], strict=True)):
            name = f"{method}.{seed}" if seed else method
            rows[name] = [row(method, seed, 2 - win, 0.5 - win, hits)]
    for name, found in rows.items():
        (tmp_path / "evaluation" / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test reads tables alone: figures take most of the time of a report."""
    monkeypatch.setattr(figures, "draw", lambda results, out: [])


@pytest.mark.usefixtures("no_figures")
def test_a_table_shows_mean_interval_and_range_of_seeds(folder: Path) -> None:
    report(RECIPE, folder)
    page = (folder / "report.md").read_text()
    cells = next(line for line in page.splitlines() if line.startswith("| deltanet |")).split(" | ")
    assert cells[1] == "3"
    assert "1.7200 (1.6200 to 1.8000)" in cells and "0.2200 (0.1200 to 0.3000)" in cells
    # All of the variation of this share is between seeds: documents' own losses cancel. A seed may be drawn thrice.
    assert "28.0 [20.0, 38.0] (20.0 to 38.0)" in cells
    # 30 of the 100 facts that each seed is asked, not 90 of 300 (which would be [25.1, 35.4]).
    assert "30.0 [21.9, 39.6] (10.0 to 60.0)" in cells


def test_ablations_are_paired_by_seed_and_measured_against_the_difference_between_seeds(folder: Path) -> None:
    report(RECIPE, folder)
    lines = (folder / "report.md").read_text().splitlines()
    ce = next(line for line in lines if line.startswith("| deltanet-ce | deltanet |")).split(" | ")
    # A tenth of a nat worse with every seed: paired, nothing varies, though the seeds are further apart.
    assert ce[2:8] == [
        "3",
        "128",
        "+100.0 [+100.0, +100.0]",
        "+100.0 [+100.0, +100.0]",
        "180.0",
        "worse, less than between seeds",
    ]
    one = next(line for line in lines if line.startswith("| deltanet-router | deltanet |")).split(" | ")
    assert (
        one[2] == "1"
        and one[7] == "worse, less than between seeds"
        and one[9:11] == ["5.0 [2.2, 11.2]", "10.0 [5.5, 17.4] |"]
    )


def test_pairs_have_the_seeds_that_both_have(folder: Path) -> None:
    (folder / "evaluation" / "deltanet.2.jsonl").unlink()
    pairs = {group.method: (group, other) for group, other in Results(RECIPE, folder).pairs()}
    assert [[each["seed"] for each in group.seeds] for group in pairs["deltanet-ce"]] == [[0, 1], [0, 1]]
    assert [[each["seed"] for each in group.seeds] for group in pairs["deltanet-router"]] == [[0], [0]]


def test_the_bootstrap_draws_seeds_as_well() -> None:
    rng = np.random.default_rng(2)
    documents, seeds = rng.normal(size=400), np.array([-1.0, 0.0, 0.5, 1.5])
    names = [str(n) for n in range(400)]
    value, low, high = bootstrap(lambda x: x, [documents + seeds[:, None]], names)
    assert value == pytest.approx((documents + seeds[:, None]).mean())
    # Variances add up: of a mean over documents, and over seeds drawn with replacement.
    width = 2 * 1.96 * np.sqrt(documents.var() / 400 + seeds.var() / 4)
    assert high - low == pytest.approx(width, rel=0.1)
    _, low, high = bootstrap(
        lambda x, y: x - y, [documents + seeds[:, None], seeds[:, None] - 1 + 0 * documents], names
    )
    assert high - low == pytest.approx(2 * 1.96 * documents.std() / 20, rel=0.1)  # paired: the seeds cancel
    alone = bootstrap(lambda x: x, [documents], names)
    assert bootstrap(lambda x: x, [documents[None]], names) == alone
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap(lambda x, y: x - y, [np.ones((2, 400)), np.ones((3, 400))], names)


@pytest.mark.usefixtures("no_figures")
def test_the_parts_of_the_gap_add_up_to_what_is_won_back(folder: Path) -> None:
    near = {"none": [1.0, 1], "0": [1.0, 2], "128": [1.0, 3], "256": [1.0, 4]}
    losses = {"full": 1.0, "window_only": 2.0, "deltanet": 1.8, "deltanet.1": 1.8, "deltanet.2": 1.8}
    for file in (folder / "evaluation").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for each in rows:
            loss = losses.get(file.stem, 1.9)
            each["loss_by_repeat"] = {key: [loss, number] for key, (_, number) in near.items()}
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    group = next(group for group in Results(RECIPE, folder).groups if group.method == "deltanet")
    # A fifth of the gap, on 1, 2 and 3 + 4 of 10 tokens: 128 and more are beyond the budget.
    np.testing.assert_allclose(group.by_repeat(group.first), [0.02, 0.04, 0.14])
    report(RECIPE, folder)
    assert "| deltanet | +2.0 | +4.0 | +14.0 |" in (folder / "report.md").read_text()
    lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    first = next(line for line in lines if (line["method"], line["seed"]) == ("deltanet", 0))
    assert first["won_back_by_repeat"] == [0.02, 0.04, 0.14]


def test_figures_say_how_many_texts_and_what_the_spread_is(folder: Path) -> None:
    figure = figures.cost(Results(RECIPE, folder))
    assert figure is not None
    assert "texts" in figure.get_suptitle()
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert {"sinks + window", "DeltaNet", "upright: lowest to highest seed"} <= set(words)


@pytest.mark.slow
def test_committed_rows_draw_the_figures_of_the_page(tmp_path: Path) -> None:
    redraw.main(tmp_path)
    names = {*(f"study-{name}" for name in redraw.STUDY), *redraw.REPORT.values(), redraw.BOOK}
    assert {path.stem for path in tmp_path.iterdir()} == names

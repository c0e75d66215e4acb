"""Every number of docs/results.md that is about this study, from the files beside this one.

python tables.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "quality"))

from stages.intervals import bootstrap  # noqa: E402

from ahn.measure.intervals import wilson  # noqa: E402

METHODS = (
    "full",
    "window_only",
    "gated_deltanet",
    "gated_deltanet-slow",
    "gated_deltanet-content",
    "deltanet",
    "slots",
    "slotted_deltanet",
)
MEMORIES = METHODS[2:]
BUDGETS = (256, 512, 1024)
LENGTH = 8192


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


JOINED = {(r["method"], r["context"], r["budget"]): r for r in read(HERE / "results.jsonl")}
ROWS = {
    (r["method"], r["context"], r["budget"]): r
    for path in sorted((HERE / "evaluation").glob("*.jsonl"))
    for r in read(path)
}


def share(hits: int, asked: int) -> str:
    low, high = wilson(hits, asked)
    return f"{100 * hits / asked:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def table(context: int, budget: int, methods: tuple[str, ...]) -> None:
    print(f"\n{budget} of {context}: loss | won back % | KL | recalled % | needles %")
    for name in methods:
        row = JOINED[name, context, budget]
        grid = [cell for depths in row["needles"].values() for cell in depths.values()]
        value, low, high = (100 * part for part in row["won_back"])
        needles = share(sum(h for h, _ in grid), sum(n for _, n in grid))
        print(
            f"| {name} | {row['loss']:.4f} | {value:.1f} ({low:.1f} to {high:.1f}) | {row['kl']:.4f} "
            f"| {share(*row['recall_beyond'])} | {needles} | {row['kv_bytes'] / 2**20:.1f} "
            f"| {(row['state_bytes'] + row['gate_bytes']) / 2**20:.1f} | window {row['window']} slots {row['slots']}"
        )


def by_repeat(budget: int) -> None:
    """Where the gap lies, and what each memory changes there, in percent of the whole gap and of the part's."""
    full, window = (ROWS[name, LENGTH, budget] for name in METHODS[:2])
    gap = window["loss"] - full["loss"]
    count = sum(number for _, number in full["loss_by_repeat"].values())
    print(f"\n{budget}: by how long ago the pair was last seen; gap {gap:.4f}")
    groups: dict[str, list[str]] = {"never": ["none"], "inside": [], "beyond": []}
    for name in full["loss_by_repeat"]:
        if name != "none":
            groups["inside" if int(name) < budget else "beyond"].append(name)
    for label, names in [*groups.items(), *[(name, [name]) for name in full["loss_by_repeat"]]]:
        tokens = sum(full["loss_by_repeat"][name][1] for name in names)

        def part(row: dict[str, Any], names: list[str] = names) -> float:
            return sum(loss * number for loss, number in map(row["loss_by_repeat"].get, names)) / count

        whole = part(window) - part(full)
        cells = [f"{name} {100 * (part(window) - part(ROWS[name, LENGTH, budget])) / gap:+.1f}" for name in MEMORIES]
        own = [f"{100 * (part(window) - part(ROWS[name, LENGTH, budget])) / whole:.1f}" for name in MEMORIES]
        print(f"| {label} | {100 * tokens / count:.1f} % of tokens | {100 * whole / gap:.1f} % of gap |", *cells)
        print(f"      share of the part's own gap ({whole * count / tokens:.3f} nats a token): ", *own)


def difference(one: str, other: str, budget: int) -> None:
    columns = [np.array(ROWS[name, LENGTH, budget]["chunk_losses"]) for name in (one, other)]
    found = bootstrap(lambda a, b: a - b, columns, ROWS[one, LENGTH, budget]["sources"])
    print(f"{one} - {other} at {budget}, mnat:", *[f"{1000 * number:+.1f}" for number in found])


def positions(budget: int) -> None:
    full = ROWS["full", LENGTH, budget]["loss_by_position"]
    size = ROWS["full", LENGTH, budget]["position_size"]
    for label, where in {"first quarter": slice(budget // size, 4), "last quarter": slice(12, 16)}.items():
        above = {
            name: np.mean(ROWS[name, LENGTH, budget]["loss_by_position"][where]) - np.mean(full[where])
            for name in METHODS[1:]
        }
        cells = [f"{name} {loss:.3f} ({100 - 100 * loss / above['window_only']:.1f})" for name, loss in above.items()]
        print(f"{budget}, {label}: nats above full attention (% won back):", *cells)


def forgetting() -> None:
    """E-folds in tokens without the part that depends on the token: 1 / (exp(A_log) softplus(dt_bias))."""
    rng = np.random.default_rng(0)
    step = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), 1_000_000))
    start = 1 / (rng.uniform(0, 16, step.size).clip(1e-4) * step)
    found = {"published init": start}
    for name, layers in json.loads((HERE / "forgetting.json").read_text()).items():
        a, b = (np.array([layer[key] for layer in layers]) for key in ("A_log", "dt_bias"))
        found[name] = 1 / (np.exp(a) * np.log1p(np.exp(b)))
    for name, folds in found.items():
        ends = np.quantile(folds, [0.05, 0.25, 0.5, 0.75, 0.95])
        beyond = 100 * (folds > 512).mean()
        print(f"{name}: 5, 25, 50, 75, 95 %", *[f"{end:.0f}" for end in ends], f"longer than 512: {beyond:.1f} %")
    for name in ("gated_deltanet-slow", "gated_deltanet-content"):
        moved = np.log(found[name] / (256 * 64 ** np.linspace(0, 1, 8)))
        mean, most = 100 * np.abs(moved).mean(), 100 * np.abs(moved).max()
        print(f"{name}: training moved the logarithm of e-folds by {mean:.1f} % on average, {most:.1f} % at most")


def training() -> None:
    """KL of 25 steps; `expected` is what sinks + window gives at evaluation for the totals drawn in those steps."""
    from stages.distill import schedule
    from stages.recipe import SEED
    from stages.recipes import STUDY

    kl = {budget: JOINED["window_only", LENGTH, budget]["kl"] for budget in BUDGETS}
    kl |= {128: kl[256] ** 2 / kl[512], 2048: kl[1024] ** 2 / kl[512]}  # along the curve: not measured
    draw = schedule(STUDY.distillation, SEED).draw
    files = sorted((HERE / "distill").glob("*.jsonl"))
    logs = {path.stem: {row["step"]: row["kl"] for row in read(path)[1:]} for path in files}
    for end in range(25, 500, 25):
        expected = np.mean([kl[draw(step, LENGTH).lossless] for step in range(end - 25, end)])
        cells = [f"{name} {log[end]:.4f} ({log[end] / expected:.2f})" for name, log in logs.items() if end in log]
        print(end, f"expected {expected:.3f}:", *cells)


for budget in BUDGETS:
    table(LENGTH, budget, METHODS)
for context in (16384, 32768, 65536):
    table(context, 512, METHODS[:2])
for budget in BUDGETS:
    by_repeat(budget)
    positions(budget)
for budget in BUDGETS:
    difference("gated_deltanet-slow", "gated_deltanet", budget)
    difference("gated_deltanet-content", "gated_deltanet-slow", budget)
    difference("deltanet", "gated_deltanet", budget)
    difference("deltanet", "gated_deltanet-slow", budget)
forgetting()
training()

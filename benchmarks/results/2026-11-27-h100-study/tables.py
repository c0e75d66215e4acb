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

BASELINES = ("full", "window_only", "ct_max", "ct_avg")
MEMORIES = ("mamba2", "mamba2-slow", "gated_deltanet", "gated_deltanet-slow", "deltanet", "deltanet-long")
CODES = ("two_bits", "two_bits-half")
METHODS = (*BASELINES, *MEMORIES, *CODES)
BUDGETS = (256, 512, 1024)
FAR = (16384, 32768, 65536)
LENGTH = 8192
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
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


def kib(row: Row) -> str:
    exact, codes = row["kv_bytes"] / 1024, row["quantized_bytes"] / 1024
    state = (row["state_bytes"] + row["gate_bytes"]) / 1024
    return f"{exact + codes + state:.0f} KiB = exact {exact:.0f} + codes {codes:.0f} + state {state:.0f}"


def table(context: int, budget: int) -> None:
    print(f"\n{budget} of {context}: seed | kept | bytes | loss | won back % | KL | recalled % | needles %")
    for name in METHODS:
        row = JOINED.get((name, context, budget))
        if row is None:
            continue
        grid = [cell for depths in row["needles"].values() for cell in depths.values()]
        value, low, high = (100 * part for part in row["won_back"])
        needles = share(sum(h for h, _ in grid), sum(n for _, n in grid))
        kept = f"{row['sinks'] + row['window']} + {row['quantized']}"
        print(
            f"| {name} | {row['seed']} | {kept} | {kib(row)} | {row['loss']:.4f} "
            f"| {value:.1f} ({low:.1f} to {high:.1f}) | {row['kl']:.4f} | {share(*row['recall_beyond'])} | {needles} "
            f"| parameters {row['parameters']}"
        )


def base() -> None:
    row, held_out = (json.loads((HERE / name).read_text()) for name in ("base.json", "prepare.json"))
    print(f"base: {row['parameters']} parameters, {row['tokens']} tokens, {row['seconds']} s on {row['device']}")
    print(f"held out: {len(held_out['held_out_tokens'])} packages and modules")
    for path in sorted((HERE / "distill").glob("*.jsonl")):
        steps = read(path)[0]["steps"]
        print(f"{path.stem}: {steps} steps, {steps * 8 * LENGTH} tokens")


def a_token() -> None:
    """Bytes of a token, all layers: exactly, and at two bits."""
    row = ROWS["two_bits", LENGTH, 512]
    exact = row["kv_bytes"] / (row["sinks"] + row["window"])
    codes = row["quantized_bytes"] / row["quantized"]
    state = ROWS["gated_deltanet", LENGTH, 512]["state_bytes"]
    print(f"\na token: {exact:.0f} bytes, {codes:.0f} at two bits, 1/{exact / codes:.1f}; a state: {state / exact:.0f}")


def by_distance(budget: int) -> None:
    print(f"\n{budget} of {LENGTH}: recalled by distance")
    for name in METHODS:
        recall = JOINED[name, LENGTH, budget]["recall"]
        cells = [f"≥{low} {hits}/{asked} {100 * hits / asked:.0f} %" for low, (hits, asked) in recall.items()]
        print(f"{name}:", *cells)


def by_repeat(budget: int) -> None:
    """Where the gap lies, and what each method changes there, in percent of the whole gap and of the part's."""
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

        def part(row: Row, names: list[str] = names) -> float:
            return sum(loss * number for loss, number in map(row["loss_by_repeat"].get, names)) / count

        whole = part(window) - part(full)
        if label == "beyond":
            need = (0.35 * gap - (gap - whole)) / whole
            print(f"if all else were won back, 35 % of the gap would take {100 * need:.1f} % of the part beyond")
        won = {name: part(window) - part(ROWS[name, LENGTH, budget]) for name in (*MEMORIES, *CODES)}
        print(f"| {label} | {100 * tokens / count:.1f} % of tokens | {100 * whole / gap:.1f} % of gap |", end=" ")
        print(*[f"{name} {100 * loss / gap:+.1f}" for name, loss in won.items()])
        print(f"      share of the part's own gap ({whole * count / tokens:.3f} nats a token):", end=" ")
        print(*[f"{name} {100 * loss / whole:.1f}" for name, loss in won.items()])


def equal_bytes() -> None:
    """What figures/cost.png shows: the same tokens and facts at every budget."""
    print(f"\nnats above full attention from token {BUDGETS[-1]} on; recalled of facts as long ago")
    for name in METHODS[1:]:
        for budget in BUDGETS:
            row, full = (JOINED[method, LENGTH, budget] for method in (name, "full"))
            start = BUDGETS[-1] // row["position_size"]
            above = np.mean(row["loss_by_position"][start:]) - np.mean(full["loss_by_position"][start:])
            found = [cell for low, cell in row["recall"].items() if int(low) >= BUDGETS[-1]]
            hits, asked = np.sum(found, axis=0)
            print(f"{name} {budget}: {above:.3f} | {share(int(hits), int(asked))} | {kib(row)}")


def difference(one: str, other: str, budget: int) -> None:
    columns = [np.array(ROWS[name, LENGTH, budget]["chunk_losses"]) for name in (one, other)]
    found = bootstrap(lambda a, b: a - b, columns, ROWS[one, LENGTH, budget]["sources"])
    print(f"{one} - {other} at {budget}, mnat:", *[f"{1000 * number:+.1f}" for number in found])


def quarters(budget: int) -> None:
    full = ROWS["full", LENGTH, budget]["loss_by_position"]
    size = ROWS["full", LENGTH, budget]["position_size"]
    for label, where in {"first quarter": slice(budget // size, 4), "last quarter": slice(12, 16)}.items():
        above = {
            name: np.mean(ROWS[name, LENGTH, budget]["loss_by_position"][where]) - np.mean(full[where])
            for name in METHODS[1:]
        }
        cells = [f"{name} {loss:.3f} ({100 - 100 * loss / above['window_only']:.1f})" for name, loss in above.items()]
        print(f"{budget}, {label}: nats above full attention (% won back):", *cells)


def far() -> None:
    """Losses of long texts, whole and last quarter, and where full attention is worse than a window."""
    for context in FAR:
        print(f"\n{context}: loss | of the last quarter | recalled")
        for name in METHODS:
            row = JOINED.get((name, context, 512))
            if row is not None:
                last = np.mean(row["loss_by_position"][12:])
                print(f"{name}: {row['loss']:.3f} | {last:.3f} | {share(*row['recall_beyond'])}")
        full, window = (np.array(ROWS[name, context, 512]["loss_by_position"]) for name in METHODS[:2])
        size = ROWS["full", context, 512]["position_size"]
        print("full attention is worse than sinks + window from", (size * np.flatnonzero(full > window)).tolist())


def forgetting() -> None:
    """E-folds in tokens without the part that depends on the token: 1 / (exp(A_log) softplus(dt_bias)).

    A Mamba2's projection of the step has a bias besides.
    """
    print("\ne-folds")
    rng = np.random.default_rng(0)
    step = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), 1_000_000))
    found = {"published init of Gated DeltaNet": 1 / (rng.uniform(0, 16, step.size).clip(1e-4) * step)}
    for name, layers in json.loads((HERE / "forgetting.json").read_text()).items():
        a, b, projected = (
            np.array([layer.get(key, np.zeros(8)) for layer in layers]) for key in ("A_log", "dt_bias", "dt_proj.bias")
        )
        b = b + projected
        found[name] = 1 / (np.exp(a) * np.log1p(np.exp(b)))
    for name, folds in found.items():
        ends = np.quantile(folds, [0.05, 0.25, 0.5, 0.75, 0.95])
        beyond = 100 * (folds > 512).mean()
        print(f"{name}: 5, 25, 50, 75, 95 %", *[f"{end:.0f}" for end in ends], f"longer than 512: {beyond:.1f} %")
    for name in (name for name in found if "slow" in name):
        moved = np.log(found[name] / (256 * 64 ** np.linspace(0, 1, 8)))
        mean, most = 100 * np.abs(moved).mean(), 100 * np.abs(moved).max()
        print(f"{name}: training moved the logarithm of e-folds by {mean:.1f} % on average, {most:.1f} % at most")


def training() -> None:
    """KL over windows of 100 steps; two memories see the same batches and windows at the same step and seed."""
    print("\nKL in training, means of 100 steps")
    for path in sorted((HERE / "distill").glob("*.jsonl")):
        log = [row["kl"] for row in read(path)[1:]]
        print(path.stem, *[f"{np.mean(log[at : at + 4]):.4f}" for at in range(0, len(log), 4)])


def others() -> None:
    """The older study's rows with the same names, and ahn-tiny's Mamba2 with either start."""
    print("\nolder study, 512 of 8192")
    for row in read(HERE.parent / "2026-11-26-h100-study" / "results.jsonl"):
        if (row["context"], row["budget"]) == (LENGTH, 512) and row["method"] in METHODS:
            print(f"{row['method']}: won back {100 * row['won_back'][0]:.1f}, recalled {share(*row['recall_beyond'])}")
    for row in read(HERE / "tiny" / "mamba2.jsonl"):
        print(f"ahn-tiny, Mamba2, slow start: {row['context']} read: {share(*row['recall_beyond'])}")
    for row in read(HERE.parent / "2026-11-23-ahn-tiny" / "distill-mamba2.jsonl"):
        if "loss_after" in row:
            cells = [f"{name[17:]} {number}" for name, number in row.items() if name.startswith("recall_after")]
            print(f"ahn-tiny, Mamba2, published start: {row['length']} read:", *cells)


base()
for budget in BUDGETS:
    table(LENGTH, budget)
for context in FAR:
    table(context, 512)
for budget in BUDGETS:
    by_distance(budget)
    by_repeat(budget)
    quarters(budget)
a_token()
equal_bytes()
print()
for budget in BUDGETS:
    difference("two_bits-half", "two_bits", budget)
    difference("deltanet", "gated_deltanet", budget)
    difference("deltanet-long", "deltanet", budget)
    difference("mamba2-slow", "mamba2", budget)
    difference("gated_deltanet-slow", "gated_deltanet", budget)
far()
forgetting()
training()
others()

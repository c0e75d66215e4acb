"""The results that stay in the repository: small, listed, and what the documents say of them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from typing import Any

import pytest
from support.results import RESULTS, ROOT, document, rows

from ahn.measure.intervals import wilson

METHODS = {
    "full attention": "full",
    "sinks + window": "window_only",
    "CT-max": "ct_max",
    "CT-avg": "ct_avg",
    "Mamba2": "mamba2",
    "Gated DeltaNet": "gated_deltanet",
    "DeltaNet": "deltanet",
    "Routed DeltaNet": "routed_deltanet",
    "Routed DeltaNet, 1 000 steps": "routed_deltanet-long",
    "`two_bits`": "two_bits",
    "`two_bits-half`": "two_bits-half",
    "`two_bits-half`, DeltaNet": "two_bits-half+deltanet",
    "`two_bits-half`, Routed DeltaNet of 1 000 steps": "two_bits-half+routed_deltanet",
}
STATES = {
    "four states instead of its eight": "routed_4",
    "sixteen states": "routed_16",
    "DeltaNet, 1 000 steps": "deltanet-long",
    "four states, 1 000 steps": "routed_4-long",
    "`two_bits-half`, four states of 1 000 steps": "two_bits-half+routed_4-long",
}
PASSAGES = "retained 4096 4/2, passages of 64, scores of layer 18"
REAL = {
    "full attention": "full attention",
    "sinks + window": "sinks + window",
    "a longer window, in the bytes of retained tokens": "window of as many bytes",
    "4 096 retained tokens in passages that one head chooses, keys at 4 bits, values at 2": PASSAGES,
    "4 096 that each head chooses for itself": "retained 4096 4/2",
    "2 048 of them behind a tier of 2 048": "retained 2048 4/2 behind a tier of 2048",
    "1 024 retained tokens, exact": "retained 1024 exact",
    "tier of all other tokens, keys at 2 calibrated bits, values at 4": "tier 7680 2/4, calibrated",
    "the same, values at 2 bits": "tier 7680 2/2, calibrated",
    "tier of all other tokens, 4 and 2 bits, nothing calibrated": "tier 7680 4/2",
    "tier of all other tokens, 3 and 2 bits": "tier 7680 3/2",
    "DeltaNet": "deltanet",
    "Gated DeltaNet": "gated_deltanet",
    "Mamba2": "mamba2",
    "Routed DeltaNet": "routed_deltanet",
}
SHARED = "retained 4096 4/2, passages of 64, one score for all heads"
RULER = ("full attention", "tier 7680 4/2", "tier 7680 2/4, calibrated", SHARED, "sinks + window")
AGAIN = {
    "full attention": ("full attention",) * 2,
    "a longer window": ("window of as many bytes",) * 2,
    "tier, 4 and 2 bits, nothing calibrated": ("tier 7680 4/2",) * 2,
    "tier, 3 and 2 bits": ("tier 7680 3/2",) * 2,
    "tier, keys at 2 calibrated bits, values at 4": ("tier 7680 2/4, calibrated",) * 2,
    "the same, values at 2 bits": ("tier 7680 2/2, calibrated",) * 2,
    "retained tokens in passages": (PASSAGES, SHARED),
    "2 048 of them behind a tier of 2 048": ("retained 2048 4/2 behind a tier of 2048",) * 2,
    "DeltaNet": ("deltanet",) * 2,
    "Gated DeltaNet": ("gated_deltanet",) * 2,
}


def test_results_are_few_and_listed() -> None:
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) <= 1.5e6
    listed = set(re.findall(r"^\| `([^`]+?)/?` \|", (RESULTS / "README.md").read_text(encoding="utf-8"), flags=re.M))
    assert listed == {path.name for path in RESULTS.iterdir()} - {"README.md"}


def tables(section: str) -> list[list[dict[str, str]]]:
    """The tables of a section of docs/results.md: cells by the head of their column, without stars."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    text = re.split(r"^##+ ", text.split(f"# {section}\n")[1], flags=re.M)[0].replace("*", "")
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found.append([dict(zip(head, cells, strict=True)) for cells in lines])
    return found


def number(cell: str) -> float:
    """What stands before the interval."""
    return float(cell.split("(")[0].replace("−", "-").replace(" ", ""))


def study(budget: int) -> dict[str, dict[str, float]]:
    """Means over seeds at 8 192 tokens, by method."""
    found = defaultdict(list)
    for name in ("h100-quality.jsonl", "h100-quality-states.jsonl"):
        for row in rows(name):
            if (row["context"], row["budget"]) == (8192, budget):
                found[row["method"]].append(row | {"file": name})
    means = {}
    for method, both in found.items():
        runs = [row for row in both if row["file"] == both[0]["file"]]
        bytes_ = [row[f"{part}_bytes"] for part in ("kv", "quantized", "state", "gate") for row in runs[:1]]
        means[method] = {
            "seeds": len(runs),
            "KiB": sum(bytes_) / 1024,
            "loss": statistics.mean(row["loss"] for row in runs),
            "won back": statistics.mean(100 * row["won_back"][0] for row in runs),
            "recalled": 100
            * sum(row["recall_beyond"][0] for row in runs)
            / sum(row["recall_beyond"][1] for row in runs),
        }
    return means


def test_main_table_of_results() -> None:
    costs, worth, budgets = tables("Main table: 512 tokens kept exactly, 8 192 read")
    assert [row["method"] for row in costs] == [row["method"] for row in worth] == list(METHODS)
    means = study(512)
    for cost, found in zip(costs, worth, strict=True):
        mean = means[METHODS[cost["method"]]]
        assert mean["seeds"] == int(cost["seeds"] or 1)
        assert f"{mean['KiB']:.0f}" == cost["cache KiB"].replace(" ", "")
        assert f"{mean['loss']:.4f}" == found["loss"]
        assert mean["won back"] == pytest.approx(number(found["won back %"] or "100"), abs=0.051)
        assert mean["recalled"] == pytest.approx(number(found["recalled %"]), abs=0.051)
    for row in budgets:
        for (head, cell), budget in zip(list(row.items())[1:], (256, 512, 1024), strict=True):
            assert head.replace(" ", "").startswith(str(budget))
            mean = study(budget)[(METHODS | STATES)[row["method"]]]
            assert [mean["won back"], mean["recalled"]] == pytest.approx([*map(float, cell.split("/"))], abs=0.051)


def test_table_of_the_real_model() -> None:
    """Bytes, losses, shares and facts of every line, and that no line is without a row."""
    measured_rows = {row["name"]: row for row in rows("smollm2-h200.jsonl") if row["stage"] == "rows"}
    full, window = measured_rows["full attention"], measured_rows["sinks + window"]
    (table,) = tables("On a real model")
    assert [cells[""] for cells in table] == list(REAL)
    for cells in table:
        row = measured_rows[REAL[cells[""]]]
        assert f"{row['cache_bytes'] / 2**20:.1f}" == cells["cache MiB"]
        for kind in ("prose", "code"):
            loss, won_back = cells[f"{kind}: loss, won back %"].split(",")
            key = f"{kind}_loss"
            assert f"{row[key]:.3f}" == loss
            share = 100 * (window[key] - row[key]) / (window[key] - full[key])
            assert share == pytest.approx(number(won_back), abs=0.51)
        assert row["one_right"] == number(cells["one number found %"])
        share = 100 * row["several_right"] / row["several_asked"]
        assert share == pytest.approx(number(cells["of several facts %"]), abs=0.51)


README_MODEL = {
    "full attention": "full attention",
    "sinks + window": "sinks + window",
    "+ 4 096 retained tokens: the passages that later text is expected to look at most": PASSAGES,
    "+ the 7 680 tokens before the window, keys at two calibrated bits, values at four": "tier 7680 2/4, calibrated",
    "+ the same tokens at four and two bits, with nothing to calibrate": "tier 7680 4/2",
    "+ DeltaNet, the best memory of the paper here, trained for two minutes": "deltanet",
}


def test_real_model_in_the_readme() -> None:
    """Its table, the book, and the numbers that were said 57 000 tokens before."""
    stages: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows("smollm2-h200.jsonl"):
        stages[row["stage"]][row["name"]] = row
    full, window = stages["rows"]["full attention"], stages["rows"]["sinks + window"]
    for head, name in README_MODEL.items():
        row = stages["rows"][name]
        won = [100 * (window[loss] - row[loss]) / (window[loss] - full[loss]) for loss in ("prose_loss", "code_loss")]
        low, high = (100 * bound for bound in wilson(row["one_right"], row["one_asked"]))
        cells = f"{row['cache_bytes'] / 2**20:.1f} MiB | {won[0]:.0f}, {won[1]:.0f} %"
        found = f"{row['one_right']} % ({low:.0f}–{high:.0f})"
        assert f"| {head} | {cells} | {found} |" in document("README.md"), (cells, found)
    tier, kept, bare, afresh = (
        statistics.mean(stages["book"][name]["book_losses"][-8:])
        for name in ("tier 7680 4/2, reach 2048", PASSAGES, "sinks + window", "full attention")
    )
    far, *others = (stages["far"][name] for name in (PASSAGES, "tier 7680 4/2, reach 2048", "sinks + window"))
    assert [row["far_right"] for row in others] == [0, 0]
    for said in (
        f"the loss per token is {tier:.3f} nats with the tier",
        f"{kept:.3f} with retained tokens, and {bare:.3f} with the window alone",
        f"every 4 096 tokens has {afresh:.3f}.",
        f"Of {far['far_asked']} numbers that were said 57 000 tokens before, retained tokens find {far['far_right']}",
        f"of {others[0]['far_asked']} such numbers the tier and the window alone find none",
    ):
        assert said in document("README.md")


def test_small_model_in_the_readme_and_in_the_choice() -> None:
    """Shares of the study at 512 tokens: of the loss won back, and of the facts recalled."""
    means = study(512)
    won = {method: f"{mean['won back']:.0f}" for method, mean in means.items()}
    recalled = {method: f"{mean['recalled']:.0f}" for method, mean in means.items()}
    paper = sorted(won[method] for method in ("mamba2", "gated_deltanet", "deltanet"))
    for said in (
        f"the memories of the paper win back {paper[0]} to {paper[-1]} % of the loss, and Routed DeltaNet, a memory of "
        f"ours, wins back {won['routed_deltanet']} %.",
        f"it wins back {won['routed_deltanet-long']} %, and recalls {recalled['routed_deltanet-long']} % of the facts",
    ):
        assert said in document("README.md")
    for method in ("deltanet", "gated_deltanet", "mamba2", "routed_deltanet"):
        assert f"| `{method}` | {recalled[method]} %, {won[method]} % |" in document("docs/choose.md")


def test_demo_of_the_start_page() -> None:
    for row in json.loads((RESULTS / "ahn-tiny" / "demo.json").read_text(encoding="utf-8"))["results"]:
        low, high = (f"{100 * bound:.0f}" for bound in row["facts_interval"])
        line = (
            f"{row['name']} {row['perplexity']:.2f} {100 * row['gap_won_back']:.0f}% "
            f"{100 * row['facts_recalled'] / row['facts_asked']:.0f}% ({low}-{high}) "
            f"{row['cache_bytes'] / 2**20:.1f} {row['peak_bytes'] / 2**20:.0f}"
        )
        assert line in document("docs/start.md")


def test_demo_of_a_real_model_in_the_readme() -> None:
    """Perplexity over 2 048 tokens each, the cache at the end, numbers found, tokens per second."""
    run = json.loads((RESULTS / "smollm2-book-cpu.json").read_text(encoding="utf-8"))
    for row in run["results"]:
        pairs = zip(row["perplexity"][::2], row["perplexity"][1::2], strict=True)
        perplexity = " ".join(f"{math.sqrt(first * second):.0f}" for first, second in pairs)
        line = (
            f"{row['name']} {perplexity} {row['cache_bytes'][-1] / 2**20:.0f} {row['found']}/{row['asked']} "
            f"{run['length'] / row['seconds']:.0f}"
        )
        assert line in document("README.md")


def test_what_was_measured_again() -> None:
    """Both runs of each line, and that no row of the second is left out."""
    (table,) = tables("Measured again")
    found = {row["name"]: row for row in rows("smollm2-h200.jsonl") if row["stage"] == "rows"}
    assert {f"{second}, again" for _, second in AGAIN.values()} == {
        name for name in found if name.endswith(", again")
    } - {"sinks + window, again"}
    for cells in table:
        name, *shown = cells.values()
        expected = []
        for row, run in zip(
            (found[n] for n in (AGAIN[name][0], f"{AGAIN[name][1]}, again")), ("", ", again"), strict=True
        ):
            full, window = found[f"full attention{run}"], found[f"sinks + window{run}"]
            shares = [
                100 * (window[kind] - row[kind]) / (window[kind] - full[kind]) for kind in ("prose_loss", "code_loss")
            ]
            expected.append((", ".join(f"{x:.0f}" for x in shares), str(row["one_right"]), str(row["several_right"])))
        assert shown == [cell for pair in zip(*expected, strict=True) for cell in pair], name


def test_table_of_ruler() -> None:
    (table,) = tables("RULER")
    by_name = {row["way"]: row["scores"] for row in rows("smollm2-h200.jsonl") if row["stage"] == "tasks"}
    assert by_name.keys() == {*RULER}
    found = [row for row in rows("smollm2-h200.jsonl") if row["stage"] == "ruler"]
    other = {row["name"]: row["means"] for row in found if "means" in row}
    names = ("full attention", PASSAGES, "retained 2048 4/2 behind a tier of 2048")
    full, kept, behind = (f"{statistics.mean(other[name].values()):.1f}" for name in names)
    before = f"{other[names[0]]['ruler/niah_single_2/4k']:.0f}"
    now = f"{100 * statistics.mean(by_name[names[0]]['ruler/niah_single_2/4k']):.0f}"
    assert (
        f"full attention had {full} points (needle 2: {before} instead of {now}), passages {kept}, "
        f"and 2 048 retained tokens behind a tier {behind}."
    ) in " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    for column, name in zip(list(table[0])[1:], RULER, strict=True):
        scores = [100 * statistics.mean(samples) for samples in by_name[name].values()]
        shown = [number(cells[column]) for cells in table]
        assert shown == pytest.approx([statistics.mean(scores), *scores], abs=0.051), column


def test_what_stops_a_linear_memory() -> None:
    """The table of docs/log.md, row by row in the order of the file, and what docs/results.md repeats of it."""
    log = (ROOT / "docs" / "log.md").read_text(encoding="utf-8").split("### What stops a linear memory")[1]
    table = [line.split("|") for line in log.split("\n\nIn hindsight")[0].splitlines() if line.startswith("| ")][1:]
    found = {row["name"]: row for row in rows("smollm2-linear.jsonl") if "name" in row}
    assert len(table) == len(found) == 15
    order = [
        *("full attention", "sinks + window", "fact, softmax", "fact, softmax before RoPE", "fact, lossless, scaled"),
        *("fact, lossless, normalised", "fact, lossless after RoPE, scaled", "fact, delta", "fact, delta before RoPE"),
        *("fact, hindsight", "passage, softmax", "passage, delta", "all, delta", "all, hindsight"),
        "all, hindsight every 1024",
    ]
    for cells, row in zip(table, (found[name] for name in order), strict=True):
        said = cells[3].replace("*", "").strip()
        low, high = (f"{100 * x:.0f}" for x in row["chats"]["interval"])
        share = f"{100 * row['chats']['right'] / row['chats']['n']:.0f} %"
        assert said.startswith(f"{row['predicted'][0]}, {share}"), cells
        assert f"({low}–{high})" in said, cells
        for kind in ("prose", "code"):
            if "won" in row.get(kind, {}):
                assert f"{100 * row[kind]['won']:.0f}".replace("-", "−") in cells[4], cells
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    right = [found[name]["chats"]["right"] for name in ("fact, softmax", "full attention", "fact, hindsight")]
    assert f"| {right[0]} (full attention with all tokens: {right[1]}) |" in results and f"| {right[2]} |" in results

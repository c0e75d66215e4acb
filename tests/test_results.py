"""The results that stay in the repository: small, listed, and what the documents say of them."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def test_results_are_few_and_listed() -> None:
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) <= 1.5e6
    listed = set(re.findall(r"^\| `([^`]+?)/?` \|", (RESULTS / "README.md").read_text(encoding="utf-8"), flags=re.M))
    assert listed == {path.name for path in RESULTS.iterdir()} - {"README.md"}


def main_table() -> list[list[str]]:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = text.split("## Main table")[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[2:]]


def test_main_table_of_results() -> None:
    found = defaultdict(list)
    for row in rows("h100-quality.jsonl"):
        if (row["context"], row["budget"]) == (8192, 512):
            found[row["method"]].append(row)
    table = main_table()
    assert [cells[0] for cells in table] == list(METHODS)
    for cells in table:
        runs = found[METHODS[cells[0]]]
        loss, won_back, recalled = cells[5], re.sub(r"[*]|\(.*", "", cells[6]), re.sub(r"[*]|\(.*", "", cells[8])
        assert len(runs) == int(cells[1] or 1)
        assert f"{statistics.mean(row['loss'] for row in runs):.4f}" == loss
        if won_back.strip():
            mean = statistics.mean(100 * row["won_back"][0] for row in runs)
            assert mean == pytest.approx(float(won_back.replace("−", "-")), abs=0.051)
        share = 100 * sum(row["recall_beyond"][0] for row in runs) / sum(row["recall_beyond"][1] for row in runs)
        assert share == pytest.approx(float(recalled), abs=0.051)


def measured(name: str, **wanted: Any) -> dict[str, Any]:
    """The newest row of `ahn bench` with these fields."""
    return [row for row in rows(name) if all(row.get(key) == value for key, value in wanted.items())][-1]


def test_headline_of_performance() -> None:
    """The first table of docs/performance.md."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split("## ")[0]
    long = {"model": "qwen2.5-3b", "context": 131072, "window": 32640, "quantized": 0, "method": "gated_deltanet"}
    newest = "h200-bench-2026-12-01.jsonl"
    read = measured(newest, measurement="prefill", **long)
    assert f"{read['seconds']:.2f} s, {100 * read['share']:.0f} % of the limit" in text
    step = measured(newest, measurement="decode", batch=1, **long)
    assert f"{1000 * step['seconds']:.2f} ms, {100 * step['share']:.0f} % of the limit" in text
    assert f"through `generate` {1000 * step['generate_s']:.2f}" in text
    assert f"{read['peak_bytes'] / 1e9:.1f} GB" in text
    full = measured("h200-bench.jsonl", measurement="prefill", context=131072, method="full-dynamic")
    assert f"{full['seconds']:.2f} s" in text and f"{full['peak_bytes'] / 1e9:.1f} GB" in text
    together = measured("h200-bench.jsonl", measurement="throughput", batch=100)
    assert f"{together['tokens_per_second']:,.0f} tokens/s".replace(",", " ") in text
    assert f"{measured('h100-bench.jsonl', measurement='prefill', **long)['seconds']:.2f} s" in text
    steps = [row for row in rows("h100-bench.jsonl") if row.get("measurement") == "decode"]
    best = min((row for row in steps if all(row.get(k) == v for k, v in long.items())), key=lambda row: row["seconds"])
    assert f"{1000 * best['seconds']:.2f} ms, {100 * best['share']:.0f} %" in text
    trained = measured("h100-bench.jsonl", measurement="train", model="qwen2.5-7b")
    assert f"{trained['tokens_per_second']:,.0f} tokens/s".replace(",", " ") in text


def test_conversations_that_decode_together() -> None:
    """The table of docs/performance.md: milliseconds a step and the share of the limit, by how many there are."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    _, table = text.split("| conversations of 128k that decode together, H200 |")
    counts, _, _, times, shares = ([cell.strip() for cell in line.split("|")[-9:-1]] for line in table.splitlines()[:5])
    newest = "h200-bench-2026-12-01.jsonl"
    for count, time, share in zip(counts, times, shares, strict=True):
        if time and "*" not in time:  # those in italics are older
            kind = "throughput" if int(count) > 16 else "decode"
            row = measured(newest, measurement=kind, batch=int(count), method="gated_deltanet", quantized=0)
            assert (f"{1000 * row['seconds']:.2f}", f"{100 * row['share']:.0f} %") == (time, share)

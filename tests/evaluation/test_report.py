"""Reports: the right number in the right cell, published ones marked as such, and a page that needs nothing else."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ahn.errors import AHNError
from ahn.evaluation.report import figures, gradients, published, tables, write_report
from ahn.evaluation.report.collect import collect
from ahn.measure import plots

MODEL = {"model": "tiny", "weights": ["w"], "window": 224, "sinks": 32}
FULL = {"method": "full", "memory": None, "window": None, "sinks": None}
WINDOW = {"method": "window", "memory": "window_only"}
GDN = {"method": "ahn", "memory": "gated_deltanet"}


def result(
    out: Path,
    model: Mapping[str, Any],
    task: str,
    score: float | None = None,
    lines: Mapping[str, Sequence[Any]] | None = None,
    about: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A result folder. `more` are settings where their names say so, else figures."""
    settings = {"task": task, "profile": "official", "limit": None, "task_settings": {}} | MODEL | dict(model)
    settings |= {name: more.pop(name) for name in ("profile", "limit", "task_settings", "weights") if name in more}
    figures = {"task": task, "samples": 4, **({} if score is None else {"score": score}), **more}
    folder = out / f"{len(list(out.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"settings": settings, "about": dict(about or {})}))
    (folder / "result.json").write_text(json.dumps(figures))
    for name, rows in (lines or {}).items():
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_score_is_in_its_cell(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for model, qmsum, vt in ((FULL, 30.0, 90.0), (WINDOW, 10.0, None), (GDN, 20.126, 55.0)):
        result(tmp_path / "in", model, "longbench/qmsum", qmsum)
        if vt is not None:
            result(tmp_path / "in", model, "ruler/vt/4k", vt)
    write_report([tmp_path / "in"], tmp_path / "out")
    rows = cells(tmp_path / "out" / "scores.csv")
    assert [(row["method"], row["sinks"], row["window"]) for row in rows] == [
        ("full attention", "", ""),
        ("sinks + window", "32", "224"),
        ("AHN gated_deltanet", "32", "224"),
    ]
    assert [row["longbench/qmsum, 4 samples"] for row in rows] == ["30.00", "10.00", "20.13"]
    assert [row["ruler/vt/4k, 4 samples"] for row in rows] == ["90.00", "", "55.00"]
    text = (tmp_path / "out" / "report.txt").read_text()
    assert re.search(r"tiny +AHN gated_deltanet +32 +224 +20\.13 +55\.00", text)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>30.00</b>" in page and "<b>20.13</b>" not in page  # the best measured one


def test_means_are_over_the_same_tasks(tmp_path: Path) -> None:
    for task, full, window in (("cmrc_mixup", 10.0, 20.0), ("lic_mixup", 30.0, None), ("factrecall_en", 50.0, 40.0)):
        result(tmp_path, FULL, f"lveval/{task}/16k", full)
        if window is not None:
            result(tmp_path, WINDOW, f"lveval/{task}/16k", window)
    for profile, score in (("official", 1.0), ("paper", 3.0)):
        result(tmp_path, FULL, "longbench/qmsum", score, profile=profile)
        result(tmp_path, FULL, "longbench/musique", score + 1, profile=profile)
    for kind in ("number", "fact"):
        result(tmp_path, FULL, f"needle/{kind}", 50.0, grid=[{"length": 512, "depth": 0.0, "score": 50.0}])
    columns = {column.label: column.scores for column in collect([tmp_path]).columns}
    assert columns["mean of lveval/16k"] == {"full attention": 30.0}  # the other row lacks a task
    assert columns["mean of longbench (official)"] == {"full attention": 1.5}
    assert columns["mean of longbench (paper)"] == {"full attention": 3.5}
    assert {"longbench/qmsum (official)", "longbench/qmsum (paper)"} <= columns.keys()
    assert not any("needle" in label for label in columns if label.startswith("mean"))


def test_the_same_task_run_in_other_ways_has_other_columns(tmp_path: Path) -> None:
    for limit, score in ((None, 1.0), (10, 2.0)):
        result(tmp_path, FULL, "ruler/vt/4k", score, limit=limit)
    columns = collect([tmp_path]).columns
    assert [(column.label, column.scores["full attention"]) for column in columns] == [
        ("ruler/vt/4k (1)", 1.0),
        ("ruler/vt/4k (2)", 2.0),
    ]


def test_of_two_runs_of_the_same_the_newest_counts(tmp_path: Path) -> None:
    for n, score in enumerate((1.0, 3.0, 2.0)):
        file = result(tmp_path, FULL, "ruler/vt/4k", score) / "result.json"
        os.utime(file, (n % 2, n % 2))
    assert [column.scores for column in collect([tmp_path]).columns] == [{"full attention": 3.0}]


def test_rows_that_would_have_one_name_get_what_tells_them_apart(tmp_path: Path) -> None:
    for n, adapter in enumerate(("a", "b")):
        result(tmp_path, GDN, "ruler/vt/4k", 1.0, weights=[str(n)], about={"adapter": f"/adapters/{adapter}"})
    result(tmp_path, GDN | {"window": 99}, "ruler/vt/4k", 1.0)
    result(tmp_path, WINDOW | {"model": "one"}, "ruler/vt/4k", 1.0)
    result(tmp_path, WINDOW | {"model": "two"}, "ruler/vt/4k", 1.0)
    labels = {row.label for row in collect([tmp_path]).rows}
    assert labels == {
        "AHN gated_deltanet (32 + 224) (a)",
        "AHN gated_deltanet (32 + 224) (b)",
        "AHN gated_deltanet (32 + 99)",
        "sinks + window (one)",
        "sinks + window (two)",
    }


def test_quantized_tokens_make_a_row(tmp_path: Path) -> None:
    for tier, score in (({}, 1.0), ({"quantized": 1784}, 2.0), ({"quantized": 96}, 3.0)):
        result(tmp_path, GDN | tier, "ruler/vt/4k", score)
    result(tmp_path, WINDOW | {"quantized": 96}, "ruler/vt/4k", 4.0)
    result(tmp_path, WINDOW | {"quantized": 96, "key_bits": 4, "value_bits": 2}, "ruler/vt/4k", 5.0)
    assert [column.scores for column in collect([tmp_path]).columns] == [
        {
            "sinks + window + 96 at two bits": 4.0,
            "sinks + window + 96 at 4/2 bits": 5.0,
            "AHN gated_deltanet": 1.0,
            "AHN gated_deltanet + 96 at two bits": 3.0,
            "AHN gated_deltanet + 1,784 at two bits": 2.0,
        }
    ]


def test_published_numbers_stand_beside_what_they_are_numbers_of(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    result(tmp_path / "in", GDN, "ruler/niah_single_1/128k", 12.5)
    result(tmp_path / "in", GDN, "ruler/niah_single_1/4k", 99.0)
    result(tmp_path / "in", GDN, "longbench/qmsum", 20.0)
    write_report([tmp_path / "in"], tmp_path / "out")
    rows = cells(tmp_path / "out" / "scores.csv")
    quoted = {row["method"]: row for row in rows[1:]}
    assert quoted.keys() == {
        "published: full attention",
        "published: sinks + window",
        "published: AHN gated_deltanet",
    }
    assert quoted["published: full attention"]["ruler/niah_single_1/128k, 4 samples"] == "98.60"
    assert quoted["published: full attention"]["ruler/niah_single_1/4k, 4 samples"] == ""
    assert quoted["published: full attention"]["model"] == "Qwen2.5-7B"
    assert "not measured here" in (tmp_path / "out" / "report.txt").read_text()


def test_published_means_need_the_papers_tasks_and_all_samples(tmp_path: Path) -> None:
    def beside(folder: str, tasks: Sequence[str], **more: Any) -> bool:
        (tmp_path / folder).mkdir()
        for task in tasks:
            result(tmp_path / folder, GDN, f"longbench/{task}", 40.0, **more)
        found = tables.scores(collect([tmp_path / folder]))
        assert found is not None
        return bool(found.quoted)

    six = ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")
    assert beside("paper", six, profile="paper")
    assert not beside("official", six)
    assert not beside("few", six, profile="paper", limit=5)
    assert not beside("five", six[1:], profile="paper")


def test_published_numbers_are_those_of_the_paper() -> None:
    scores = published.rows()
    assert scores["Qwen2.5-3B, full attention"] == {"mean of lveval/128k": 4.41, "mean of infinitebench": 9.52}
    assert scores["Qwen2.5-14B, AHN deltanet"] == {"mean of lveval/128k": 6.50, "mean of infinitebench": 17.48}
    seven = scores["Qwen2.5-7B, AHN gated_deltanet"]
    assert (seven["mean of longbench"], seven["ruler/niah_multikey_3/128k"]) == (40.59, 8.6)
    assert len(seven) == 3 + 8


BUCKETS = {
    name: [
        {"start": 100 * n, "stop": 100 * (n + 1), "loss": loss + n, "cache_bytes": 2**20, "seconds": 1.0}
        | {"peak_bytes": 2**21}
        for n in range(count)
    ]
    for name, loss, count in (("full", 1.0, 5), ("gdn", 2.0, 8))
}
COST = [{"length": 1 << n, "flops": 10**n, "cache_bytes": 2**n} for n in range(10, 21)]


def long_document(out: Path, window: int = 224) -> None:
    for name, model in (("full", FULL), ("gdn", GDN | {"window": window})):
        tokens = BUCKETS[name][-1]["stop"]
        result(
            out,
            model,
            "perplexity",
            lines={"positions.jsonl": BUCKETS[name], "cost.jsonl": COST},
            task_settings={"sha256": "abc", "tokens": tokens},  # one was read further than the other
            document="a <book>",
            tokens=tokens,
            loss=1.5,
            loss_beyond=None,
            cache_bytes=3 * 2**20,
            peak_bytes=None if name == "full" else 2**21,
            tokens_per_second=1234.5,
        )


def test_perplexities_are_compared_over_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    long_document(tmp_path / "in")
    write_report([tmp_path / "in"], tmp_path / "out")
    full, gdn = cells(tmp_path / "out" / "perplexity.csv")
    # Sinks + window end at 256, so the first whole bucket beyond is that from 300; the shorter reading ends at 500.
    assert full["from 300 to 500"] == f"{math.exp(1 + 3.5):.3f}"
    assert gdn["from 300 to 500"] == f"{math.exp(2 + 3.5):.3f}"
    assert (full["tokens"], gdn["tokens"], gdn["perplexity"]) == ("500", "800", f"{math.exp(1.5):.3f}")
    assert (full["peak MiB"], gdn["peak MiB"], gdn["cache MiB"]) == ("", "2.0", "3.0")
    assert not (tmp_path / "out" / "scores.csv").exists()  # there are none
    assert "a &lt;book&gt;" in (tmp_path / "out" / "report.html").read_text()


def test_no_tokens_beyond_every_window(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    long_document(tmp_path / "in", window=468)  # the shorter reading ends at 500, where this window does
    write_report([tmp_path / "in"], tmp_path / "out")
    assert not any(name.startswith("from ") for name in cells(tmp_path / "out" / "perplexity.csv")[0])
    assert "share no tokens beyond every window" in (tmp_path / "out" / "report.txt").read_text()


GRID = [
    {"length": length, "depth": depth, "score": 10.0 * n, "samples": 2}
    for n, (length, depth) in enumerate((length, depth) for length in (512, 1024) for depth in (0.0, 50.0, 100.0))
]
TOKENS = [
    {"token": token, "norm": norm, "region": region}
    for token, norm, region in [
        ("<s>", 9.0, "sink"),
        ("def", 0.5, "remembered"),
        (" $x\n", 1.0, "remembered"),
        ("\n  ü" + 120 * "y", 0.0, "remembered"),
        ("end\u2028", 3.0, "window"),
    ]
]


class Page(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_holds_everything_and_needs_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for model in (FULL, WINDOW, GDN):
        result(source, model, "needle/fact", 25.0, grid=GRID)
        for level, score in (("4k", 50.0), ("16k", 20.0)):
            result(source, model, f"ruler/vt/{level}", score)
    long_document(source)
    result(source, GDN, "gradients", lines={"gradients.jsonl": TOKENS}, task_settings={"loss": "kl"})
    write_report([source], tmp_path / "out")
    made = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"needle_fact.png", "ruler_by_length.png", "perplexity.png"}
    assert made == pictures | {"scores.csv", "perplexity.csv", "published.csv", "report.txt", "report.html"}
    for name in pictures:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.loaded and all(url.startswith("data:image/png;base64,") for url in page.loaded)
    assert len(page.loaded) == 3  # the gradients are text in the page
    assert not {"script", "link", "iframe"} & set(page.tags) and "url(" not in text and "@import" not in text


def test_gradients_colour_what_is_remembered() -> None:
    assert gradients.strengths(TOKENS) == [None, 0.5, 1.0, 0.0, None]
    text = gradients.as_html(TOKENS)
    assert '<span class="sink">&lt;s&gt;</span>' in text and '<span class="window">end\u2028</span>' in text
    assert re.search(r'rgba\(209,73,91,0\.50\)" title="5\.00e-01">def<', text)
    silent = [token | {"norm": 0.0} for token in TOKENS]
    assert gradients.strengths(silent) == [None, 0.0, 0.0, 0.0, None]


def test_a_curve_needs_every_task_at_every_length(tmp_path: Path) -> None:
    for task, level, score in (("vt", "4k", 50.0), ("cwe", "4k", 30.0), ("vt", "8k", 20.0)):
        result(tmp_path, FULL, f"ruler/{task}/{level}", score)
        result(tmp_path, GDN, f"ruler/{task}/{level}", score)
    result(tmp_path, FULL, "ruler/cwe/8k", 10.0)
    figure = figures.by_length("ruler", collect([tmp_path]))
    assert figure is not None
    assert "over tasks of 4 texts" in figure.get_suptitle()
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert curves == {
        "full attention": [[4096, 40], [8192, 15]],
        "AHN gated_deltanet": [[4096, 40]],
    }
    assert figures.by_length("lveval", collect([tmp_path])) is None


def test_rows_of_one_kind_have_colours_of_their_own(tmp_path: Path) -> None:
    for n in range(4):
        result(tmp_path, GDN, "ruler/vt/4k", 1.0, weights=[str(n)])
    colours = figures.row_colours(collect([tmp_path]).rows)
    assert len(set(colours.values())) == 4 and plots.COLOURS["gated_deltanet"] in colours.values()


def test_folders_that_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AHNError, match="no finished results"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(AHNError, match="nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "bad").mkdir()
    folder = result(tmp_path / "bad", FULL, "ruler/vt/4k", 1.0)
    (folder / "config.json").write_text("{")
    with pytest.raises(AHNError, match=str(folder)):
        write_report([tmp_path / "bad"], tmp_path / "out")
    (tmp_path / "torn").mkdir()
    folder = result(tmp_path / "torn", GDN, "gradients", task_settings={"loss": "kl"})
    with pytest.raises(AHNError, match=r"gradients\.jsonl"):
        write_report([tmp_path / "torn"], tmp_path / "out")

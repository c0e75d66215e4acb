"""The figures of the pages again, from the committed rows: `python benchmarks/quality/redraw.py`.

Those of the study are in docs/results.md, those of `ahn eval report` in docs/evaluation.md, and the book's in README.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from stages import figures
from stages.recipes import RECIPES
from stages.rows import Results

from ahn.demo.book import BookResult, book_figure
from ahn.evaluation.report import write_report
from ahn.measure.plots import save

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks" / "results"
STUDY = ("cost", "recall", "repeats", "needles")
REPORT = {"perplexity": "perplexity-64k", "needle_fact": "needle-fact"}
"""Figures of the report, and what they are called in docs/images."""
BOOK = "smollm2-book"


def main(images: Path = ROOT / "docs" / "images") -> None:
    with tempfile.TemporaryDirectory() as name:
        draw_study(Path(name) / "study", images)
        draw_report(Path(name) / "evaluation", images)
    draw_book(images)


def draw_study(folder: Path, images: Path) -> None:
    (folder / "evaluation").mkdir(parents=True)
    shutil.copy(ROWS / "h100-quality.jsonl", folder / "evaluation")
    drawn = figures.draw(Results(RECIPES["study"], folder), folder / "figures")
    for figure in STUDY:
        assert figure in drawn
        shutil.copy(folder / "figures" / f"{figure}.png", images / f"study-{figure}.png")


def draw_report(folder: Path, images: Path) -> None:
    folders = []
    for line in (ROWS / "ahn-tiny-evaluation.jsonl").read_text(encoding="utf-8").splitlines():
        files = json.loads(line)
        folders.append(folder / files.pop("folder"))
        folders[-1].mkdir(parents=True)
        for name, content in files.items():
            rows, suffix = (content, "jsonl") if isinstance(content, list) else ([content], "json")
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folders[-1] / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    write_report(folders, folder / "report")
    for figure, name in REPORT.items():
        shutil.copy(folder / "report" / f"{figure}.png", images / f"{name}.png")


def draw_book(images: Path) -> None:
    data = json.loads((ROWS / f"{BOOK}-cpu.json").read_text(encoding="utf-8"))
    results = [BookResult(**result) for result in data["results"]]
    title = f"SmolLM2-135M-Instruct reads {data['text']}"
    save(book_figure(results, data["bin"], data["trained_positions"], title), images / f"{BOOK}.png")


if __name__ == "__main__":
    main()

"""The study's figures in docs/results.md again, from the committed rows: `python benchmarks/quality/redraw.py`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from stages import figures
from stages.recipes import RECIPES
from stages.rows import Results

ROOT = Path(__file__).parents[2]
SHOWN = ("cost", "recall", "repeats", "needles")


def main(images: Path = ROOT / "docs" / "images") -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "evaluation").mkdir()
        shutil.copy(ROOT / "benchmarks" / "results" / "h100-quality.jsonl", Path(name) / "evaluation")
        drawn = figures.draw(Results(RECIPES["study"], Path(name)), Path(name) / "figures")
        for figure in SHOWN:
            assert figure in drawn
            shutil.copy(Path(name) / "figures" / f"{figure}.png", images / f"study-{figure}.png")


if __name__ == "__main__":
    main()

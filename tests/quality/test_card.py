"""The card of ahn-tiny says what the logs in the repository say, and what ships is what was trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from ahn import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

from stages import card
from stages.recipes import TINY

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "ahn-tiny"
SHIPPED = Path(tiny.__file__).parent


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The logs and rows of the shipped weights, where a card can be written."""
    return Path(shutil.copytree(RESULTS, tmp_path / "run"))


def test_the_shipped_card_is_made_of_the_logs(run_folder: Path) -> None:
    card.write_card(TINY, run_folder)
    assert (run_folder / "README.md").read_text() == (SHIPPED / "README.md").read_text()


def test_the_card_says_where_each_row_was_measured(run_folder: Path) -> None:
    card.write_card(TINY, run_folder)
    text = (run_folder / "README.md").read_text()
    assert "in bfloat16 on NVIDIA H100 80GB HBM3 (two_bits, two_bits+deltanet: in float32 on CPU)" in text
    for name, memory in (("two_bits", "no memory"), ("two_bits+deltanet", "the memory of `deltanet`")):
        assert f"`{name}` sees 784 tokens before the window at two bits a number, with {memory} behind them" in text
        file = run_folder / "evaluation" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"device": "a pocket calculator"}) + "\n" for row in rows))
    card.write_card(TINY, run_folder)
    changed = (run_folder / "README.md").read_text()
    assert "(two_bits, two_bits+deltanet: in float32 on a pocket calculator)" in changed


def test_what_is_not_trained_is_not_installed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "PACKAGE", tmp_path / "package")
    (tmp_path / "package").mkdir()
    for part in ("model", "adapters"):
        shutil.copytree(SHIPPED / part, run_folder / part)
    (run_folder / "README.md").write_text("a card")
    (run_folder / "adapters" / "two_bits").mkdir()
    card.install(TINY, run_folder)
    installed = {path.name for path in (tmp_path / "package" / "adapters").iterdir()}
    assert installed == {"gated_deltanet", "deltanet", "mamba2", "routed_deltanet"}
    assert (tmp_path / "package" / "README.md").read_text() == "a card"
    for path in (SHIPPED / "adapters").rglob("*.*"):
        copied = tmp_path / "package" / path.relative_to(SHIPPED)
        assert copied.read_bytes() == path.read_bytes()

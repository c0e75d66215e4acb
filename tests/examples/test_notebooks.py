"""The notebooks run from top to bottom with small settings, and are kept with small outputs."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "benchmark_and_report": {"CONTEXT": "'256'", "LENGTH, SAMPLES": "300, 1"},
    "distil_a_memory": {"STEPS, BATCH, LENGTH": "2, 1, 96", "EVERY": "1"},
    "look_into_a_memory": {"LENGTH": "320"},
    "read_a_book": {"LENGTH": "1200"},
}
"""Settings of each, and what a test takes instead."""


def test_every_notebook_is_tried_and_listed_and_all_are_small() -> None:
    found = {path.stem: path for path in EXAMPLES.glob("*.ipynb")}
    assert found.keys() == SMALL.keys()
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in listed for name in found)
    assert sum(path.stat().st_size for path in found.values()) < 250_000


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_there_and_a_plot_each(name: str) -> None:
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent / "src"))
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for names, value in SMALL[name].items():
        settings.source, count = re.subn(rf"^{names} = .*$", f"{names} = {value}", settings.source, flags=re.M)
        assert count == 1, names
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    images = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert images, "a plot is shown"

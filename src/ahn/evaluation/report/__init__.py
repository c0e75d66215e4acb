"""Results side by side: tables with the published numbers, heat maps, curves; as text, CSV, PNG and one HTML page."""

import html
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ahn.errors import AHNError, reason
from ahn.evaluation.report import figures, gradients, tables
from ahn.evaluation.report.collect import ResultTable, collect
from ahn.evaluation.report.page import image, page
from ahn.evaluation.report.tables import Table
from ahn.files import write_text
from ahn.measure.plots import save

__all__ = ["write_report"]

BENCHMARKS_BY_LENGTH = ("lveval", "ruler", "recall")


def write_report(folders: Iterable[Path], out: Path) -> None:
    """Compare results.

    Writes `report.html` (everything, in one file), `report.txt` (the tables), and each table as CSV and each figure
    as PNG.

    Args:
        out: folder of the report; files of an earlier report are replaced.
    """
    comparison = collect(folders)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"text.parse_math": False}):  # a name with two dollar signs is a name
            _Report(comparison, out).write()
    except OSError as error:
        raise AHNError(f"The report cannot be written to {out}: {reason(error)}.") from error


class _Report:
    """Writes the files one by one and remembers what goes into the page."""

    def __init__(self, comparison: ResultTable, out: Path) -> None:
        self.comparison, self.out = comparison, out
        self.sections: list[str] = []
        self.texts: list[str] = []

    def write(self) -> None:
        scores = tables.scores(self.comparison)
        if scores is not None:
            self._table("scores", scores)
        for label, group in self.comparison.of("needle"):
            self._figure(label, figures.heat_maps(f"% of needles found by depth and length: {label}", group))
        for benchmark in BENCHMARKS_BY_LENGTH:
            curve = figures.by_length(benchmark, self.comparison)
            if curve is not None:
                self._figure(f"{benchmark} by length", curve)
        for label, group in self.comparison.of("perplexity"):
            self._table(label, tables.perplexities(label, group))
            self._figure(label, figures.long_document(f"A long document: {group[0][1].figures['document']}", group))
        for _, group in self.comparison.of("gradients"):
            for row, result in group:
                tokens = result.lines("gradients.jsonl")
                title = f"Gradient of the {result.settings['task_settings']['loss']} loss: {row.label}"
                self.sections.append(f"<h2>{html.escape(title)}</h2>{gradients.as_html(tokens)}<p>{GRADIENTS}</p>")
        self._table("published", tables.published_table())
        self._write("report.txt", "\n".join(self.texts))
        models = sorted({str(row.settings.get("model")) for row in self.comparison.rows})
        introduction = f"Models: {', '.join(models)}. {sum(len(row.results) for row in self.comparison.rows)} results."
        self._write("report.html", page("Evaluation", introduction, self.sections))

    def _table(self, name: str, table: Table) -> None:
        self._write(f"{_file(name)}.csv", table.as_csv())
        self.texts.append(table.as_text())
        self.sections.append(table.as_html())

    def _figure(self, name: str, figure: Figure) -> None:
        path = self.out / f"{_file(name)}.png"
        save(figure, path)
        self.sections.append(image(path.read_bytes(), figure.get_suptitle()))

    def _write(self, name: str, text: str) -> None:
        write_text(self.out / name, text)


GRADIENTS = (
    "Tokens that had left the window before the last tokens were predicted, coloured by the gradient of the "
    "distillation loss at their embedding: the stronger, the more would be won by remembering this token otherwise. "
    "Sinks and window are grey."
)


def _file(name: str) -> str:
    return re.sub(r"[^\w.+]+", "_", name).strip("_")

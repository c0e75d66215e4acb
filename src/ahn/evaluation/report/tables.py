"""Tables as plain text, CSV and HTML: the same cells in each."""

import csv
import dataclasses
import html
import io
import math
from collections.abc import Sequence

from ahn.evaluation.report import published
from ahn.evaluation.report.collect import ResultTable, Row, StoredResult

HEADINGS = ("model", "method", "sinks", "window")
PUBLISHED = (
    "Rows marked published are printed in arXiv 2510.07318 (128k tokens, 128 sinks + window 32640; LongBench "
    "128 + 8064). They were not measured here."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; numbers stand to the right.

    Attributes:
        text_columns: how many columns from the left are text.
        best: rows that hold the best value, by column; published rows do not compete.
        quoted: rows that were not measured here.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int
    best: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    quoted: frozenset[int] = frozenset()
    note: str = ""

    def as_text(self) -> str:
        """Aligned columns under the title."""
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        lines = [self.title, "=" * len(self.title), ""]
        for cells in (self.headings, tuple("-" * width for width in widths), *self.rows):
            padded = [
                cell.ljust(width) if n < self.text_columns else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def as_csv(self) -> str:
        """A line per row, with the headings first."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.headings, *self.rows])
        return text.getvalue()

    def as_html(self) -> str:
        """A `<table>` with its title."""
        lines = [f"<h2>{html.escape(self.title)}</h2>", '<div class="wide"><table>', "<thead><tr>"]
        lines += [f"<th{self._side(n)}>{html.escape(text)}</th>" for n, text in enumerate(self.headings)]
        lines += ["</tr></thead>", "<tbody>"]
        for number, cells in enumerate(self.rows):
            lines.append('<tr class="quoted">' if number in self.quoted else "<tr>")
            for n, cell in enumerate(cells):
                text = html.escape(cell)
                text = f"<b>{text}</b>" if number in self.best.get(n, ()) else text
                lines.append(f"<td{self._side(n)}>{text}</td>")
            lines.append("</tr>")
        lines.append("</tbody></table></div>")
        return "\n".join([*lines, *([f"<p>{html.escape(self.note)}</p>"] if self.note else [])])

    def _side(self, column: int) -> str:
        return "" if column < self.text_columns else ' class="number"'


def scores(comparison: ResultTable) -> Table | None:
    """Every row's score of every task, in percent, with published ones beneath; None without scores."""
    columns = comparison.columns
    if not columns:
        return None
    measured = [row for row in comparison.rows if any(row.label in column.scores for column in columns)]
    rows = [(*_described(row), *(_number(column.scores.get(row.label)) for column in columns)) for row in measured]
    beside = {column.name for column in columns if published.comparable(column)}
    quoted = {label: scores for label, scores in published.rows().items() if beside & scores.keys()}
    for label, found in quoted.items():
        model, _, method = label.partition(", ")
        cells = [_number(found.get(column.name) if published.comparable(column) else None) for column in columns]
        rows.append((model, f"published: {method}", "", "", *cells))
    best = {}
    for place, column in enumerate(columns, len(HEADINGS)):
        top = max(column.scores.values())
        if len(column.scores) > 1:
            best[place] = {n for n, row in enumerate(measured) if column.scores.get(row.label) == top}
    titles = [f"{column.label}, {column.samples} samples" if column.samples else column.label for column in columns]
    return Table(
        "Scores in percent",
        (*HEADINGS, *titles),
        tuple(rows),
        text_columns=2,
        best=best,
        quoted=frozenset(range(len(measured), len(rows))),
        note=PUBLISHED if quoted else "",
    )


def published_table() -> Table:
    """All published numbers."""
    rows = published.rows()
    names = dict.fromkeys(name for scores in rows.values() for name in scores)
    columns = sorted(names, key=lambda name: not name.startswith("mean"))  # stable: else as in `published`
    return Table(
        "Published numbers",
        ("model, method", *columns),
        tuple((label, *(_number(scores.get(name)) for name in columns)) for label, scores in rows.items()),
        text_columns=1,
        quoted=frozenset(range(len(rows))),
        note=PUBLISHED,
    )


def perplexities(label: str, group: Sequence[tuple[Row, StoredResult]]) -> Table:
    """Perplexity of one document, of all of it and where every method has forgotten something; cache and peak."""
    start, stop = common_range(group)
    shared = [f"from {start:,} to {stop:,}"] if start < stop else []
    rows = []
    for row, result in group:
        figures = result.figures
        beyond = mean_loss(result, start, stop)
        rows.append(
            (
                *_described(row),
                f"{figures['tokens']:,}",
                f"{math.exp(figures['loss']):.3f}",
                *(["" if beyond is None else f"{math.exp(beyond):.3f}"] if shared else []),
                _mebibytes(figures["cache_bytes"]),
                _mebibytes(figures["peak_bytes"]),
                f"{figures['tokens_per_second']:,.0f}",
            )
        )
    headings = (*HEADINGS, "tokens", "perplexity", *shared, "cache MiB", "peak MiB", "tokens/s")
    second = "is over tokens that all rows have read and that lie beyond every window"
    if not shared:
        second = "is left out: the rows share no tokens beyond every window"
    note = (
        f"{group[0][1].figures['document']}. The second perplexity {second}. Cache at the end; peak is the most that "
        "reading held beyond the model. Measuring memory slows reading on a CPU."
    )
    return Table(label.capitalize(), headings, tuple(rows), text_columns=2, note=note)


def common_range(group: Sequence[tuple[Row, StoredResult]]) -> tuple[int, int]:
    """Positions that all have read and that lie beyond each one's sinks + window."""
    exact = [(row.settings.get("window") or 0) + (row.settings.get("sinks") or 0) for row, _ in group]
    starts = [one["start"] for one in group[0][1].lines("positions.jsonl")]
    stop = min(result.figures["tokens"] for _, result in group)
    return next((start for start in starts if start >= max(exact)), stop), stop


def mean_loss(result: StoredResult, start: int, stop: int) -> float | None:
    """Mean loss of the buckets between two positions, weighted by their tokens."""
    total = count = 0.0
    for bucket in result.lines("positions.jsonl"):
        if start <= bucket["start"] and bucket["stop"] <= stop:
            tokens = bucket["stop"] - max(1, bucket["start"])
            total, count = total + tokens * bucket["loss"], count + tokens
    return total / count if count else None


def _described(row: Row) -> tuple[str, str, str, str]:
    settings = row.settings
    exact = (settings.get(name) for name in ("sinks", "window"))
    sinks, window = ("" if n is None else f"{n:,}" for n in exact)
    return str(settings.get("model", "")), row.label, sinks, window


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"

"""From result folders to what is compared: rows (a model as a method uses it) and columns (a task as it was run)."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ahn.config import BEFORE
from ahn.errors import AHNError, reason
from ahn.evaluation.report import fields
from ahn.evaluation.results import averaged_with, digest
from ahn.memory.retained_tokens import RetainedTokens

NAMES = {"full": "full attention", "window": "sinks + window", "ct-max": "CT-Max", "ct-avg": "CT-Avg"}
"""What methods without an adapter are called."""
BENCHMARKS = ("lveval", "infinitebench", "longbench", "ruler", "recall")
"""Whose tasks have a mean."""
VARIANT = ("profile", "limit", "max_new_tokens", "truncation", "task_settings")
"""Settings of the task, not of the model: results are compared where these are equal."""
MODEL = (
    "model",
    "method",
    "memory",
    "window",
    "sinks",
    "quantized",
    "weights",
    "dtype",
    "router",
    "q_proj",
    "full_attention_layers",
    "slots",
    "passage",
    "score_layer",
)
"""Settings of the model that make a row."""
TIER = ("key_bits", "value_bits", "keys_before_rope", "calibrated_keys")
"""Of quantized tokens, which older results do not say."""


@dataclasses.dataclass(frozen=True)
class StoredResult:
    """One folder: its `result.json`, the settings that led to it, and where the model came from."""

    path: Path
    figures: dict[str, Any]
    settings: dict[str, Any]
    about: dict[str, Any]

    @property
    def task(self) -> str:
        """Such as "longbench/qmsum", "needle/fact", "perplexity" or "gradients"."""
        return str(self.figures["task"])

    @property
    def variant(self) -> str:
        """Equal for results of the same task, run in the same way; a document may have been read less far."""
        settings = {name: self.settings.get(name) for name in VARIANT}
        if self.task == "perplexity":
            settings["task_settings"] = {k: v for k, v in self.settings["task_settings"].items() if k != "tokens"}
        return digest(settings)

    @property
    def row(self) -> str:
        """Equal for results of the same model, used in the same way."""
        older = {name: BEFORE[name] for name in TIER} if self.settings.get("quantized") else {}
        tier = {name: (older | self.settings).get(name) for name in TIER}
        return digest({name: self.settings.get(name) for name in MODEL} | tier)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file of the folder, one of `fields.LINES`."""
        try:
            text = (self.path / name).read_text(encoding="utf-8")
            rows = [fields.parsed(line) for line in text.split("\n") if line]  # splitlines also splits at U+2028
            for row in rows:
                fields.check(row, fields.LINES[name])
            return rows
        except (OSError, ValueError, RecursionError) as error:
            raise AHNError(f"{self.path / name} cannot be read: {reason(error)}.") from error


@dataclasses.dataclass(frozen=True)
class Row:
    """A model as a method uses it, with its results.

    Attributes:
        label: short, and different from those of other rows.
        kind: what a colour stands for: the memory, or the method.
    """

    label: str
    kind: str
    results: tuple[StoredResult, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Of its first result: those of the model are the same for all."""
        return self.results[0].settings

    def find(self, task: str, variant: str) -> StoredResult | None:
        """Its result of a task: the newest, if versions of packages have changed between runs."""
        return next((one for one in reversed(self.results) if (one.task, one.variant) == (task, variant)), None)


@dataclasses.dataclass(frozen=True)
class Column:
    """A task as it was run, or a mean over tasks.

    Attributes:
        label: the task's name, with a number where it was run in several ways.
        scores: in percent, by the row's label.
        samples: behind each score; None for a mean.
        way: profile and limit, which the tasks of a mean have in common.
        members: the tasks of a mean.
    """

    label: str
    scores: dict[str, float]
    samples: int | None = None
    way: tuple[Any, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The label without its mark."""
        return self.label.partition(" (")[0]


@dataclasses.dataclass(frozen=True)
class ResultTable:
    """All results, sorted into rows."""

    rows: tuple[Row, ...]

    @cached_property
    def tasks(self) -> list[tuple[str, str, str]]:
        """(label, task, variant) of everything that was run, in order of the labels."""
        found: dict[str, dict[str, str]] = {}
        for row in self.rows:
            for result in row.results:
                found.setdefault(result.task, {})[result.variant] = str(result.settings["profile"])
        labelled = []
        for task, variants in found.items():
            profiles = list(variants.values())
            for number, (variant, profile) in enumerate(variants.items(), 1):
                mark = profile if profiles.count(profile) == 1 else str(number)
                labelled.append((task if len(variants) == 1 else f"{task} ({mark})", task, variant))
        return sorted(labelled, key=lambda item: _in_order(item[0]))

    @cached_property
    def columns(self) -> list[Column]:
        """Every task with a score, then means over the tasks of a benchmark."""
        columns = []
        for label, task, variant in self.tasks:
            found = {row.label: result for row in self.rows if (result := row.find(task, variant))}
            scores = {row: one.figures["score"] for row, one in found.items() if "score" in one.figures}
            if scores:
                first = next(iter(found.values()))
                way = (first.settings["profile"], first.settings.get("limit"))
                columns.append(Column(label, scores, first.figures.get("samples"), way))
        return columns + self._means(columns)

    def of(self, task: str) -> list[tuple[str, list[tuple[Row, StoredResult]]]]:
        """(label, rows with their results) of each way that a task, or one whose name begins with it, was run."""
        groups = []
        for label, name, variant in self.tasks:
            if name == task or name.startswith(f"{task}/"):
                found = [(row, result) for row in self.rows if (result := row.find(name, variant))]
                groups.append((label, found))
        return groups

    def _means(self, columns: Sequence[Column]) -> list[Column]:
        """Means over tasks, of rows that have all of them: others would be means of something else."""
        groups: dict[tuple[str, tuple[Any, ...]], list[Column]] = {}
        for column in columns:
            if column.label.partition("/")[0] in BENCHMARKS:
                groups.setdefault((averaged_with(column.name), column.way), []).append(column)
        means = []
        for (name, way), members in groups.items():
            rows = [row.label for row in self.rows if all(row.label in column.scores for column in members)]
            if len(members) > 1 and rows:
                scores = {row: sum(column.scores[row] for column in members) / len(members) for row in rows}
                several = sum(other == name for other, _ in groups) > 1
                mark = f" ({', '.join(str(part) for part in way if part)})" if several else ""
                label = f"mean of {name}{mark}"
                means.append(Column(label, scores, way=way, members=tuple(column.label for column in members)))
        return means


def collect(folders: Iterable[Path]) -> ResultTable:
    """Everything in some result folders, or in folders of them."""
    results: dict[Path, StoredResult] = {}
    for folder in folders:
        if not folder.is_dir():
            raise AHNError(f"{folder} is no folder: name folders that `ahn eval` wrote results to.")
        for file in sorted(folder.rglob("result.json")):
            results[file.parent.resolve()] = _load(file.parent)
    if not results:
        raise AHNError("There are no finished results in these folders (a finished one has a result.json).")
    groups: dict[str, list[StoredResult]] = {}
    for result in sorted(results.values(), key=lambda one: (one.path / "result.json").stat().st_mtime):
        groups.setdefault(result.row, []).append(result)
    ordered = sorted(groups.values(), key=_order)
    labels = _labels([group[0] for group in ordered])
    return ResultTable(
        tuple(Row(label, _kind(group[0]), tuple(group)) for label, group in zip(labels, ordered, strict=True))
    )


def _load(path: Path) -> StoredResult:
    try:
        figures = fields.parsed((path / "result.json").read_text(encoding="utf-8"))
        config = fields.parsed((path / "config.json").read_text(encoding="utf-8"))
        fields.check_result(figures, config)
        return StoredResult(path, figures, config["settings"], config.get("about") or {})
    except (OSError, ValueError, RecursionError) as error:
        raise AHNError(f"{path} is no result folder, or is damaged: {reason(error)}.") from error


def _order(group: list[StoredResult]) -> tuple[Any, ...]:
    """By model, then full attention, the baselines, the memories; then by window and quantized tokens."""
    settings = group[0].settings
    tokens = tuple(settings.get(name) or 0 for name in ("window", "quantized", "key_bits", "value_bits"))
    methods = [*NAMES, "ahn"]
    place = methods.index(settings["method"]) if settings["method"] in methods else len(methods)
    return str(settings.get("model")), place, str(settings.get("memory")), tokens, group[0].row


def _kind(result: StoredResult) -> str:
    memory = result.settings.get("memory")
    return str(memory) if result.settings["method"] == "ahn" else str(result.settings["method"])


def _labels(firsts: Sequence[StoredResult]) -> list[str]:
    """A name for each row; what tells rows of one name apart is added until all differ."""
    names = [NAMES.get(kind := _kind(one), f"AHN {kind}") + _kept(one) + _tier(one) for one in firsts]
    for detail in (_exact, lambda one: one.settings.get("model"), _adapter, lambda one: one.row[:6]):
        details = [detail(one) for one in firsts]
        for name in {name for name in names if names.count(name) > 1}:
            places = [n for n, other in enumerate(names) if other == name]
            if len({details[n] for n in places}) > 1:
                for n in places:
                    names[n] = f"{name} ({details[n]})" if details[n] else name
    return names


def _tier(one: StoredResult) -> str:
    """Results from before they said how many bits are of two for keys and two for values."""
    quantized = one.settings.get("quantized")
    bits = [one.settings.get(name, BEFORE[name]) for name in ("key_bits", "value_bits")]
    label = "two bits" if bits == [2, 2] else f"{bits[0]}/{bits[1]} bits"
    label += ", calibrated" if one.settings.get("calibrated_keys") else ""
    return f" + {quantized:,} at {label}" if quantized else ""


def _kept(one: StoredResult) -> str:
    """What a memory keeps as tokens."""
    if one.settings.get("memory") != RetainedTokens.name or one.settings["method"] != "ahn":
        return ""
    passage = one.settings.get("passage", 1)
    return f" {one.settings['slots']:,}" + (f" in passages of {passage}" if passage > 1 else "")


def _exact(one: StoredResult) -> str | None:
    window, sinks = one.settings.get("window"), one.settings.get("sinks")
    return None if window is None else f"{sinks} + {window}"


def _adapter(one: StoredResult) -> str | None:
    adapter = one.about.get("adapter")
    return Path(adapter).name if adapter else None


def _in_order(label: str) -> list[tuple[int, str]]:
    """Numbers in a label by their size: 8k before 16k."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", label)]

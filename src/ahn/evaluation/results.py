"""A result folder: what one task gave with one configuration. It explains itself, and a killed run goes on in it.

config.json               everything that can change a score, with its digest, and where things came from
predictions.jsonl         a line per sample, without contexts; `predictions.N.jsonl` of each process until all are done
result.json               the task's figures; no times, so that it is the same however often the run was interrupted
timing.N.jsonl            seconds of each sample; where several are answered together, of the first for all
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from ahn.errors import AHNError, installed_version, reason
from ahn.evaluation.documents import LongDocument
from ahn.evaluation.methods import Evaluated
from ahn.files import read_json, write_json, write_text

COLUMNS = ("task", "profile", "method", "model", "memory", "window", "sinks", "quantized", "limit")
"""Settings that a result repeats, so that a table needs no other file."""
PACKAGES = ("ahn", "torch", "transformers", "tokenizers")
"""Whose versions can change a loss."""
DIGITS = 10
"""Hexadecimal digits of the digest in a folder's name."""


class ResultFolder:
    """The folder of one configuration.

    Args:
        settings: everything that can change a score; JSON types.
        about: the rest that is worth knowing; JSON types.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.settings, self.about = settings, about
        self.digest = digest(settings)
        self.path = out / f"{_readable(settings)}-{self.digest[:DIGITS]}"

    def open(self) -> None:
        """Make the folder and describe it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            config = self.path / "config.json"
            if config.exists():
                if read_json(config).get("digest") != self.digest:
                    raise AHNError(f"{self.path} holds the results of another configuration: choose another --out.")
                return
            write_json(config, {"digest": self.digest, "settings": dict(self.settings), "about": dict(self.about)})
        except OSError as error:
            raise AHNError(f"{self.path} cannot be used for results: {reason(error)}.") from error

    def rows(self) -> dict[int, dict[str, Any]]:
        """Every complete row so far, by its index, of all processes of this run and of earlier ones."""
        found: dict[int, dict[str, Any]] = {}
        # The merged file last: the others vanish once it is there, perhaps while this process looks.
        for file in (*sorted(self.path.glob("predictions.*.jsonl")), self.path / "predictions.jsonl"):
            for row in _complete_lines(file):
                found.setdefault(row["index"], row)
        return found

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, once there is one."""
        file = self.path / "result.json"
        return read_json(file) if file.exists() else None

    def finish(self, rows: list[dict[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
        """Put all rows, in order, into one file, and write the result."""
        write_text(self.path / "predictions.jsonl", "".join(map(_line, rows)))
        result = self.conclude({"samples": len(rows), **summary})
        # Only now: until the result is there, they are what a killed run goes on from.
        for file in self.path.glob("predictions.*.jsonl"):
            file.unlink()
        return result

    def conclude(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result: these figures, and what tells configurations apart."""
        result = {name: self.settings.get(name) for name in COLUMNS} | {"digest": self.digest, **figures}
        write_json(self.path / "result.json", result)
        return result


class Shard:
    """A process's own files in a folder: rows appended and written out one by one. Use it in a `with` block."""

    def __init__(self, folder: ResultFolder, rank: int) -> None:
        self._paths = [folder.path / f"{name}.{rank}.jsonl" for name in ("predictions", "timing")]
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        for path in self._paths:
            file = path.open("a+b")
            self._files.append(file)
            _lock(file, path)
            _repair(file)
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def append(self, row: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Add a sample's row, and its times."""
        for file, line in zip(self._files, (row, timing), strict=True):
            file.write(_line(line).encode())
            file.flush()


def open_folder(
    out: Path, task: str, evaluated: Evaluated, document: LongDocument, settings: Mapping[str, Any]
) -> ResultFolder:
    """The folder of a model and a document; it may hold a result already.

    Args:
        settings: all else that the measurement depends on, as JSON types.
    """
    text = {"document": document.name, "sha256": document.sha256, "tokens": len(document.ids)}
    everything = {"task": task, "profile": "official", **evaluated.settings, "task_settings": text | dict(settings)}
    everything["versions"] = {name: installed_version(name) for name in PACKAGES}
    folder = ResultFolder(out, everything, evaluated.about)
    folder.open()
    return folder


def conclude(
    folder: ResultFolder, lines: Mapping[str, Sequence[Mapping[str, Any]]], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files (rows by name, as JSON lines), then the result, which says that all is there."""
    for name, rows in lines.items():
        write_text(folder.path / name, "".join(map(_line, rows)))
    return folder.conclude({"document": folder.settings["task_settings"]["document"], **figures})


def averages(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted means over the tasks of a benchmark, where there are several: "longbench", or "lveval/128k"."""
    groups: dict[str, list[float]] = {}
    for result in results:
        groups.setdefault(averaged_with(result["task"]), []).append(result["score"])
    return {name: sum(scores) / len(scores) for name, scores in groups.items() if len(scores) > 1}


def averaged_with(task: str) -> str:
    """What a task is averaged with: "longbench", or "lveval/128k"."""
    benchmark, *rest = task.split("/")
    return "/".join([benchmark, *rest[1:]])


def digest(settings: Mapping[str, Any]) -> str:
    """sha256 of settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _readable(settings: Mapping[str, Any]) -> str:
    parts = [settings["task"], settings["profile"], settings["model"], settings["method"]]
    if settings["method"] == "ahn":
        parts.append(settings["memory"])
    if settings.get("window") is not None:
        parts.append(f"w{settings['window']}+{settings['sinks']}")
    if settings.get("quantized"):
        bits = settings.get("key_bits", 2), settings.get("value_bits", 2)
        calibrated = "-calibrated" if settings.get("calibrated_keys") else ""
        parts.append(f"q{settings['quantized']}" + ("" if bits == (2, 2) else f"k{bits[0]}v{bits[1]}") + calibrated)
    return "-".join(re.sub(r"[^\w.+-]+", "_", str(part)) for part in parts)


def _line(row: Mapping[str, Any]) -> str:
    # A lone surrogate, which a broken prediction can hold, has no UTF-8.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


def _complete_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. A last line without its end is being written, or was when the run was killed."""
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for number, raw in enumerate(lines, 1):
        if raw.endswith(b"\n"):
            try:
                yield json.loads(raw)
            except ValueError as error:
                raise AHNError(f"{file}, line {number} is damaged: remove it, and its sample is run again.") from error


def _repair(file: IO[bytes]) -> None:
    """Cut off a line that a kill has torn."""
    file.seek(0)
    whole = 0
    for line in file:
        whole += len(line) if line.endswith(b"\n") else 0
    file.truncate(whole)
    file.seek(0, os.SEEK_END)


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
    except OSError:
        raise AHNError(f"Another process is writing {path}: wait for it, or stop it.") from None

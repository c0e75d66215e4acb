"""Result folders of what is measured on a document rather than answered sample by sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ahn.errors import installed_version
from ahn.evaluation.documents import LongDocument
from ahn.evaluation.methods import Evaluated
from ahn.evaluation.results import ResultFolder
from ahn.files import write_text

PACKAGES = ("ahn", "torch", "transformers", "tokenizers")
"""Whose versions can change a loss."""


def open_folder(
    out: Path, task: str, evaluated: Evaluated, document: LongDocument, settings: Mapping[str, Any]
) -> ResultFolder:
    """The folder of a model and a document; it may hold a result already.

    Args:
        task: what the folder is called.
        settings: all else that the measurement depends on, as JSON types.

    Raises:
        AHNError: it cannot be written.
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
        write_text(folder.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder.conclude({"document": folder.settings["task_settings"]["document"], **figures})

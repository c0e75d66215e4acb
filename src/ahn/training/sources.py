"""Where training data comes from: files, folders, Hub ids and names, as a `datasets` data set of raw rows.

JSON lines and text files become rows of undecoded bytes with the place they come from, so that one broken line is one
broken row, and rows need not share a schema. Parquet files and Hub data sets keep their columns.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, Features, IterableDataset, Value

from ahn.errors import AHNError

Rows: TypeAlias = Dataset | IterableDataset
Stamp: TypeAlias = tuple[str, int, int]

HUB = {"chatqa2": "Seerkfang/ChatQA2-Long-SFT-data-long_sft_train_filtered"}
"""Data sets by the name that the published recipe gives them: ChatQA2's long half, as chat `messages`."""
STANDARD_LIBRARY = {"stdlib": False, "stdlib-held-out": True}
"""Text that every machine has, Python's own sources: what ahn-tiny was trained on, and what it never saw."""

JSON, TEXT, PARQUET = (".jsonl", ".json", ".ndjson"), (".txt", ".md"), (".parquet",)
RAW = Features({"bytes": Value("large_binary"), "form": Value("string"), "where": Value("string")})


def load_rows(names: str, streaming: bool = False, max_samples: int | None = None) -> Rows:
    """Rows of one data set, or of several with commas between their names, one after the other.

    Raises:
        AHNError: a name is neither a file, a folder with data, a known name nor a Hub data set within reach, or a
            file is damaged.
    """
    parts = [_limited(_load(name, streaming), max_samples) for name in _split(names)]
    try:
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise AHNError(f"The data sets {names} have different columns: convert them to JSON lines first.") from error


def _split(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",")]
    if not all(found):
        raise AHNError(f"dataset {names!r} has an empty name between its commas.")
    return found


def _limited(rows: Rows, max_samples: int | None) -> Rows:
    if max_samples is None:
        return rows
    return (
        rows.take(max_samples) if isinstance(rows, IterableDataset) else rows.select(range(min(max_samples, len(rows))))
    )


def _load(name: str, streaming: bool) -> Rows:
    path = Path(name).expanduser()
    if name in STANDARD_LIBRARY:
        arguments = {"held_out": STANDARD_LIBRARY[name], "python": sys.version}  # the version is for the cache's key
        return _generated(_standard_library, arguments, streaming)
    if path.is_dir():
        return _from_files(_data_files(path), streaming)
    if path.is_file():
        if path.suffix.lower() not in (*JSON, *TEXT, *PARQUET):
            raise AHNError(f"{path} is none of {', '.join((*JSON, *TEXT, *PARQUET))}: convert it to JSON lines.")
        return _from_files([path], streaming)
    if path.suffix.lower() in (*JSON, *TEXT, *PARQUET) or name.startswith((".", "/", "~")):
        raise AHNError(f"There is no file or folder {path}.")
    return _from_hub(HUB.get(name, name), streaming)


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, all of one kind, in the order of their paths."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _hidden(file.relative_to(folder)))
    kinds = [kind for kind in (JSON, TEXT, PARQUET) if any(file.suffix.lower() in kind for file in files)]
    if not kinds:
        raise AHNError(f"{folder} holds no data: none of {', '.join((*JSON, *TEXT, *PARQUET))}.")
    if len(kinds) > 1:
        raise AHNError(
            f"{folder} mixes {' and '.join(kind[0] for kind in kinds)} files: put each kind in its own folder."
        )
    return [file for file in files if file.suffix.lower() in kinds[0]]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _from_files(files: list[Path], streaming: bool) -> Rows:
    if files[0].suffix.lower() in PARQUET:
        return _load_dataset("parquet", streaming, data_files=[str(file) for file in files])
    # Size and time are part of the cache's key: an edited file is read again.
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    read = _json_rows if files[0].suffix.lower() in JSON else _text_rows
    return _generated(read, {"files": stamps}, streaming)


def _from_hub(name: str, streaming: bool) -> Rows:
    return _load_dataset(name, streaming)


def _load_dataset(name: str, streaming: bool, **kwargs: Any) -> Rows:
    try:
        return datasets.load_dataset(name, split="train", streaming=streaming, **kwargs)
    except Exception as error:  # datasets, the Hub and pyarrow have their own ones
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        what = ", ".join(kwargs["data_files"]) if kwargs else repr(name)
        hint = "" if kwargs else "; it is no file, folder or known name either"
        raise AHNError(f"Cannot load the data set {what}: {reason}{hint}.") from error


def _generated(generate: Any, arguments: dict[str, Any], streaming: bool) -> Rows:
    if streaming:
        return IterableDataset.from_generator(generate, features=RAW, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(generate, features=RAW, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, AHNError):
            raise cause from error
        raise AHNError(f"Cannot read the data: {cause}.") from error
    except ValueError as error:  # what `datasets` says about no rows at all
        raise AHNError(f"The data is empty: {', '.join(stamp[0] for stamp in arguments.get('files', ()))}.") from error


def _json_rows(files: list[Stamp]) -> Iterator[dict[str, Any]]:
    for name, _, _ in files:
        with open(name, "rb") as lines:
            start = lines.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
            lines.seek(0)
            if start.startswith(b"["):
                yield from _array_rows(name, lines.read())
                continue
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield {"bytes": line, "form": "json", "where": f"{os.path.basename(name)}:{number}"}


def _array_rows(name: str, content: bytes) -> Iterator[dict[str, Any]]:
    """A file that is one JSON list."""
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise AHNError(f"{name} is not valid JSON: {error}.") from error
    for number, row in enumerate(rows, 1):
        yield {"bytes": json.dumps(row).encode(), "form": "json", "where": f"{os.path.basename(name)}[{number}]"}


def _text_rows(files: list[Stamp]) -> Iterator[dict[str, Any]]:
    for name, _, _ in files:
        yield {"bytes": Path(name).read_bytes(), "form": "text", "where": os.path.basename(name)}


def _standard_library(held_out: bool, python: str) -> Iterator[dict[str, Any]]:
    from ahn.tiny.corpus import held_out_text, train_documents

    for name, text in held_out_text() if held_out else train_documents():
        yield {"bytes": text.encode(), "form": "text", "where": name}

"""Where training data comes from: files, folders, Hub ids and names, each as a `datasets` data set of raw rows.

JSON lines and text files become rows of undecoded bytes, so that one broken line is one broken row, and rows need not
share a schema. Tables (parquet, CSV, saved and Hub data sets) keep their columns. Every row says where it stands.
"""

import csv
import itertools
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import datasets
import fsspec
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value

from ahn.errors import AHNError, first_line, reason
from ahn.files import expanded
from ahn.private import fingerprint
from ahn.training.messages import BYTES, FORM, WHERE, printable

logger = logging.getLogger("ahn")

Rows: TypeAlias = Dataset | IterableDataset
Stamp: TypeAlias = tuple[str, str, int, int]

HUB = {"chatqa2": "Seerkfang/ChatQA2-Long-SFT-data-long_sft_train_filtered"}
"""Data sets by the name that the published recipe gives them: ChatQA2's long half, as chat `messages`."""
STANDARD_LIBRARY = {"stdlib": False, "stdlib-held-out": True}
"""Text that every machine has, Python's own sources: what ahn-tiny was trained on, and what it never saw."""

JSON, TEXT, PARQUET, CSV = (".jsonl", ".json", ".ndjson"), (".txt", ".md"), (".parquet",), (".csv", ".tsv")
KINDS = (JSON, PARQUET, CSV, TEXT)
COMPRESSED = (".gz", ".bz2", ".xz")
LONGEST_CELL = (1 << 31) - 1
"""Characters: csv's own limit, 131 072, is less than a book, and pandas has none."""
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that describe a data set; so does a README.md beside tables or JSON."""
MESSAGE = ({"role", "content"}, {"from", "value"})
"""What tells a message from a row."""
POINTER = b"version https://git-lfs.github.com/spec/"
RAW = Features({BYTES: Value("large_binary"), FORM: Value("string"), WHERE: Value("string")})


def load_rows(names: str, streaming: bool = False, max_samples: int | None = None) -> list[Rows]:
    """Rows of each data set, of which several have commas between their names; they need not have the same columns.

    Raises:
        AHNError: a name is neither a file, a folder with data, a known name nor a Hub data set within reach, or a
            file is damaged.
    """
    return [_limited(_load(name, streaming), max_samples) for name in _split(names)]


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
    path = expanded(name)
    if name in STANDARD_LIBRARY:
        arguments = {"held_out": STANDARD_LIBRARY[name], "python": sys.version}  # the version is for the cache's key
        return _generated(_standard_library, arguments, streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, streaming)
    if path.is_dir():
        return _from_files(_data_files(path), path, streaming)
    if path.is_file():
        if _kind(path) is None:
            raise AHNError(f"{path} is none of {_suffixes()}: convert it to JSON lines.")
        return _from_files([path], path.parent, streaming)
    if path.exists():
        raise AHNError(f"{path} is neither a file nor a folder but a pipe or device: write it to a file first.")
    if _kind(path) is not None or name.startswith((".", "/", "~")):
        raise AHNError(f"There is no file or folder {path}.")
    return _placed(_load_dataset(HUB.get(name, name), streaming), name)


def _suffixes() -> str:
    return ", ".join(itertools.chain(*KINDS, [f"any of them with {COMPRESSED[0]}"]))


def _kind(file: Path) -> tuple[str, ...] | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return next((kind for kind in KINDS if suffixes and suffixes[-1] in kind), None)


def _saved(folder: Path, streaming: bool) -> Rows:
    """What `save_to_disk` wrote."""
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and pyarrow have their own ones
        raise AHNError(f"Cannot load the data set {folder}: {_reason(error)}.") from error
    if isinstance(found, DatasetDict):
        if "train" not in found and len(found) != 1:
            raise AHNError(f"{folder} has no part train; name one of its folders: {', '.join(found)}.")
        if "train" not in found:
            _say_parts(folder, found)
        found = found["train"] if "train" in found else next(iter(found.values()))
    placed = _placed(found, folder.name)
    return placed.to_iterable_dataset() if streaming else placed


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, all of one kind, in the order of their paths; of several splits, `train`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _hidden(file, folder))
    files = [file for file in files if _kind(file) and file.name not in NOT_DATA]
    if any(_kind(file) != TEXT for file in files):
        files = [file for file in files if file.name.lower() != "readme.md"]
    kinds = [kind for kind in KINDS if any(_kind(file) == kind for file in files)]
    if not kinds:
        raise AHNError(f"{folder} holds no data: none of {_suffixes()}.")
    if len(kinds) > 1:
        raise AHNError(
            f"{folder} mixes {' and '.join(kind[0] for kind in kinds)} files: put each kind in its own folder."
        )
    return files if kinds == [TEXT] else _training_files(folder, files)


def _training_files(folder: Path, files: list[Path]) -> list[Path]:
    """Those that belong to the split `train` where the folder's card or the files' names tell splits apart."""
    try:
        splits = datasets.load_dataset_builder(str(folder.resolve())).config.data_files or {}
    except Exception:  # a folder that datasets cannot make out: everything in it is data
        return files
    if splits and "train" not in splits:
        _say_parts(folder, splits)
    chosen = {Path(str(file)).resolve() for file in splits.get("train", [])}
    found = [file for file in files if file.resolve() in chosen] or files
    if len(found) < len(files):
        left = ", ".join(_shown(file, folder) for file in files if file not in found)
        logger.info("%s: not of the split train, so not used: %s.", folder, left)
    return found


def _say_parts(folder: Path, parts: Iterable[Any]) -> None:
    """Whoever trains on what was meant to be held out should know."""
    logger.info("%s has no part train; what is read is its part %s.", folder, " and ".join(map(str, parts)))


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _from_files(files: list[Path], folder: Path, streaming: bool) -> Rows:
    for file in files:
        with file.open("rb") as content:
            if content.read(len(POINTER)) == POINTER:
                raise AHNError(f"{file} only points to its content in Git LFS: run `git lfs pull` in its folder.")
    kind = _kind(files[0])
    if kind in (PARQUET, CSV):
        return _tables(files, folder, kind == PARQUET, streaming)
    # Size and time are part of the cache's key: an edited file is read again.
    stamps = [
        (str(file.resolve()), _shown(file, folder), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    return _generated(_rows, {"files": stamps, "form": "json" if kind == JSON else "text"}, streaming)


def _shown(file: Path, folder: Path) -> str:
    return printable(str(file.relative_to(folder)))


def _tables(files: list[Path], folder: Path, parquet: bool, streaming: bool) -> Rows:
    parts = []
    for file in files:
        options = {} if parquet else _csv_options(file)
        rows = _load_dataset("parquet" if parquet else "csv", streaming, data_files=[str(file)], **options)
        parts.append(_placed(rows, _shown(file, folder)))
    try:
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise AHNError(f"The files in {folder} have columns that differ: {_reason(error)}.") from error


def _csv_options(file: Path) -> dict[str, Any]:
    """Every cell is text: an answer may be 7, or None."""
    separator = "\t" if ".tsv" in [suffix.lower() for suffix in file.suffixes] else ","
    try:
        with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig", newline="") as lines:
            table = csv.reader(lines, delimiter=separator)
            limit = csv.field_size_limit(LONGEST_CELL)
            try:
                names, first = next(table, []), next(table, [])
            finally:
                csv.field_size_limit(limit)
    except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
        raise AHNError(f"Cannot read {file}: {reason(error)}.") from error
    if not names or len(set(names)) < len(names):
        raise AHNError(f"{file} does not begin with a line of different column names.")
    if len(names) == 1 and (other := re.search(r"[;\t|,]", names[0])):
        raise AHNError(f"The columns of {file} are apart by {other[0]!r}, not {separator!r}: convert it, or rename it.")
    if len(first) > len(names):  # pandas would take the first cell for a name of the row, and shift the others
        raise AHNError(f"{file} has {len(first)} cells in its first row and {len(names)} columns: quote {separator!r}.")
    # pandas itself writes a first column without a name, and calls it so when it reads.
    features = Features({name or f"Unnamed: {place}": Value("string") for place, name in enumerate(names)})
    return {"sep": separator, "keep_default_na": False, "features": features, "encoding": "utf-8-sig"}


def _placed(rows: Rows, name: str) -> Rows:
    """Rows of a table with a column that says where each stands."""
    if isinstance(rows, IterableDataset):
        return rows.map(_with_place, with_indices=True, fn_kwargs={"name": name})
    places = [f"{name}:{number}" for number in range(1, len(rows) + 1)]
    # The same rows have the same key each time.
    return rows.add_column(WHERE, places, new_fingerprint=f"{fingerprint(rows)}-where")


def _with_place(row: dict[str, Any], number: int, name: str) -> dict[str, Any]:
    return row | {WHERE: f"{name}:{number + 1}"}


def _load_dataset(name: str, streaming: bool, **kwargs: Any) -> Rows:
    try:
        return datasets.load_dataset(name, split="train", streaming=streaming, **kwargs)
    except Exception as error:  # datasets, the Hub and pyarrow have their own ones
        what = ", ".join(kwargs["data_files"]) if kwargs else repr(name)
        if "corresponds to no data" in str(error) or "BatchSize must be greater" in first_line(
            error.__cause__ or error
        ):
            raise AHNError(f"The data is empty: {what}.") from error
        hint = "" if kwargs else "; it is no file, folder or known name either"
        raise AHNError(f"Cannot load the data set {what}: {_reason(error)}{hint}.") from error


def _reason(error: BaseException) -> str:
    return first_line(error.__cause__ or error)


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


def _rows(files: list[Stamp], form: str) -> Iterator[dict[str, Any]]:
    for path, name, _, _ in files:
        try:
            if form == "json":
                yield from _json_file(path, name)
                continue
            with fsspec.open(path, "rb", compression="infer") as content:
                yield {BYTES: content.read(), FORM: form, WHERE: name}
        except (OSError, EOFError, zlib.error) as error:  # such as a download that broke off
            raise AHNError(f"Cannot read {path}: {reason(error)}.") from error


def _json_file(path: str, name: str) -> Iterator[dict[str, Any]]:
    with fsspec.open(path, "rb", compression="infer") as lines:
        start = lines.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        lines.seek(0)
        if re.match(rb"\{\s*\n", start):
            raise AHNError(f"{path} has an object over several lines: write each row in one line, or one list.")
        several = start.startswith(b"[") and _begins_with_row(lines)
        lines.seek(0)
        if start.startswith(b"[") and not several:
            yield from _array_rows(path, name, lines.read())
            return
        for number, line in enumerate(lines, 1):
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield {BYTES: line, FORM: "json", WHERE: f"{name}:{number}"}


def _begins_with_row(lines: IO[bytes]) -> bool:
    """Whether the first of several lines is a whole list: one row's messages, and not the beginning of all rows."""
    first, more = itertools.islice(itertools.chain(filter(bytes.strip, lines), [b"", b""]), 2)
    try:
        return bool(more) and isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return False


def _array_rows(path: str, name: str, content: bytes) -> Iterator[dict[str, Any]]:
    """A file that is one JSON list."""
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AHNError(f"{path} is not valid JSON: {error}.") from error
    if rows and all(isinstance(row, dict) and any(keys <= row.keys() for keys in MESSAGE) for row in rows):
        rows = [rows]  # of messages: they are one conversation
    for number, row in enumerate(rows, 1):
        yield {BYTES: json.dumps(row).encode(), FORM: "json", WHERE: f"{name}[{number}]"}


def _standard_library(held_out: bool, python: str) -> Iterator[dict[str, Any]]:
    from ahn.tiny.corpus import held_out_text, train_documents

    for name, text in held_out_text() if held_out else train_documents():
        yield {BYTES: text.encode(), FORM: "text", WHERE: name}

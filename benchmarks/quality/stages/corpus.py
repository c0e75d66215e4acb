"""The text: training documents and held-out ones, each in pieces (files) that are tokenised one by one.

The installed corpus is every Python source that the running interpreter can import: its standard library and its
site-packages. A top-level package is one long document, its files in the order of their paths. Held out are the
modules of `ahn.tiny.corpus.HELD_OUT` and about 2 % of the packages, chosen by a hash of their names; neither their
tests nor near copies of their files are trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import site
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from ahn.errors import AHNError
from ahn.tiny.corpus import HELD_OUT, NOT_TEXT, held_out_text, long_lines, read_source, repeats, stdlib, train_documents

from .pool import Pool
from .recipe import Corpus

HELD_OUT_SHARE = 0.02
FEWEST = 4
"""Held-out packages, if there are as many."""
LARGE = 300_000
"""Characters of a package that holds a sequence of 65 536 tokens; half of the held-out packages are that long."""
SMALL = 60_000
"""Characters of the smallest package that is worth holding out."""
MOST_OF_ALL = 0.04
"""A package with a larger share of all text is never held out."""
LONGEST_FILE = 1_000_000
LONGEST_LINE = 1000
MEAN_LINE = 90
DIGITS = 0.15
"""Files beyond these are tables rather than text."""

Document = tuple[str, list[str]]
"""A name and the pieces that follow each other."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents to train on, and documents never trained on."""

    train: list[Document]
    held_out: list[Document]


def split(corpus: Corpus, pool: Pool, folders: Sequence[Path] = ()) -> Split:
    """The text of a recipe.

    Args:
        folders: directories of packages to take instead of the interpreter's own ("installed" only).

    Raises:
        AHNError: there is too little text.
    """
    if corpus.source == "stdlib":
        return Split([(name, [text]) for name, text in train_documents()], [(n, [t]) for n, t in held_out_text()])
    packages = _packages(folders or _roots())
    fixed = [name for name in HELD_OUT if name in packages]
    if corpus.most is not None:
        packages = _some(packages, fixed, corpus.most)
    texts = _read(packages, pool)
    sizes = {name: sum(map(len, files.values())) for name, files in texts.items() if name not in fixed}
    held_out = sorted(name for name in {*fixed, *choose_held_out(sizes)} if texts[name])
    lines = {line for name in held_out for text in texts[name].values() for line in long_lines(text)}
    tests = tuple(f"/test_{name}" for name in held_out)
    train = []
    for name, files in texts.items():
        if name in held_out:
            continue
        kept = [
            text for path, text in files.items() if not (any(map(path.__contains__, tests)) or repeats(text, lines))
        ]
        if kept:
            train.append((name, kept))
    if not train or not held_out:
        raise AHNError("There is too little Python source to train on and to hold out; name other folders.")
    return Split(train, [(name, list(texts[name].values())) for name in held_out])


def choose_held_out(sizes: dict[str, int]) -> list[str]:
    """Names of held-out packages among those of these sizes in characters, by a hash of the name alone.

    Half of them are long ones as far as there are any.
    """
    most = MOST_OF_ALL * sum(sizes.values())
    number = max(FEWEST, math.ceil(HELD_OUT_SHARE * len(sizes)))
    allowed = sorted((name for name, size in sizes.items() if SMALL <= size <= most), key=_digest)
    if not allowed:  # a small corpus
        allowed = sorted(sizes, key=_digest)[: len(sizes) // 2]
    large = [name for name in allowed if sizes[name] >= LARGE][: number // 2]
    return [*large, *[name for name in allowed if name not in large][: number - len(large)]]


def is_text(text: str) -> bool:
    """Neither generated tables nor minified data."""
    if not text or len(text) > LONGEST_FILE:
        return False
    lines = text.split("\n")
    digits = sum(map(text.count, "0123456789"))
    return len(text) < MEAN_LINE * len(lines) and max(map(len, lines)) < LONGEST_LINE and digits < DIGITS * len(text)


def load(path: str) -> str:
    """One file, or nothing where it is not text."""
    text = read_source(Path(path))
    return text if is_text(text) else ""


def _roots() -> list[Path]:
    places = [stdlib(), *(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))]
    return list(dict.fromkeys(path.resolve() for path in [*places, *map(Path, site.getsitepackages())]))


def _packages(roots: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by top-level package, both in order."""
    found: dict[str, list[Path]] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            parts = path.relative_to(root).parts
            if not NOT_TEXT.intersection(parts):
                found.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return dict(sorted(found.items()))


def _some(packages: dict[str, list[Path]], fixed: list[str], most: int) -> dict[str, list[Path]]:
    """The fixed ones, and others in the order of their hashes while `most` bytes allow them."""
    kept, room = set(fixed), most
    for name in sorted(packages, key=_digest):
        size = sum(path.stat().st_size for path in packages[name])
        if name not in kept and size <= room:
            kept.add(name)
            room -= size
    return {name: paths for name, paths in packages.items() if name in kept}


def _read(packages: dict[str, list[Path]], pool: Pool) -> dict[str, dict[str, str]]:
    """Texts by package and path; a file that occurs twice is used once."""
    owners = [(name, str(path)) for name, paths in packages.items() for path in paths]
    seen: set[bytes] = set()
    texts: dict[str, dict[str, str]] = {name: {} for name in packages}
    for (name, path), text in zip(owners, pool.map(load, [path for _, path in owners]), strict=True):
        digest = hashlib.sha256(text.encode()).digest()
        if text and digest not in seen:
            seen.add(digest)
            texts[name][path] = text if text.endswith("\n") else text + "\n"
    return texts


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()

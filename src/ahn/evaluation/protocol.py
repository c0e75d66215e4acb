"""Protocols: a benchmark's prompts, generation lengths, metrics and stop words, from the benchmark's own files.

They belong to the benchmarks and are not part of this package. `load_protocol` downloads the files at a pinned commit,
checks their sha256, reads the literals in them as data and keeps the result as one JSON file in a cache.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ahn.errors import AHNError, reason
from ahn.evaluation import protocol_sources
from ahn.evaluation.protocol_recipes import RECIPES, Protocol, Recipe
from ahn.evaluation.protocol_sources import Source
from ahn.files import expanded, read_json, write_text

logger = logging.getLogger(__name__)


def load_protocol(
    name: str, protocol_dir: str | os.PathLike[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Protocol:
    """A benchmark's protocol: `sources` (repository, revision, path, sha256 of each) and the benchmark's fields.

    Args:
        protocol_dir: use these files and no network: the finished protocol `{name}.json`, or else the benchmark's own
            files under their paths in its repository (so a clone of it will do), which must have the pinned sha256.
            A finished protocol may be your own, with your sources; one that names the pinned sources must have their
            content.
        cache_dir: where finished protocols are kept: `ahn/protocols` in $XDG_CACHE_HOME or ~/.cache if not given.
    """
    if name not in RECIPES:
        raise AHNError(f"Unknown protocol {name!r}: choose one of {', '.join(RECIPES)}.")
    recipe = RECIPES[name]
    if protocol_dir is not None:
        return _from_directory(expanded(protocol_dir), name, recipe)
    cached = (_default_cache() if cache_dir is None else expanded(cache_dir)) / f"{name}.json"
    protocol = _from_cache(cached, recipe)
    if protocol is None:
        protocol = _build(recipe, lambda source: source.text(protocol_sources.fetch(source.url), source.url))
        _write(cached, protocol)
    return protocol


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    """sha256 of a protocol's content, whatever the layout and order of its file: scores depend on it."""
    return hashlib.sha256(json.dumps(protocol, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _from_directory(directory: Path, name: str, recipe: Recipe) -> Protocol:
    finished = directory / f"{name}.json"
    if finished.is_file():
        return _finished(finished, recipe)
    missing = [source.path for source in recipe.sources if not (directory / source.path).is_file()]
    if missing:
        raise AHNError(
            f"{directory} holds neither {name}.json nor the benchmark's own files: {', '.join(missing)} not found."
        )

    def read(source: Source) -> str:
        file = directory / source.path
        try:
            return source.text(file.read_bytes(), str(file))
        except OSError as error:
            raise AHNError(f"{file} cannot be read: {reason(error)}.") from error

    return _build(recipe, read)


def _from_cache(file: Path, recipe: Recipe) -> Protocol | None:
    """The cached protocol, unless there is none, it is damaged, or it is that of another version of this package."""
    if not file.is_file():
        return None
    try:
        protocol = _finished(file, recipe)
    except AHNError as error:
        logger.warning("The cached protocol is made again. %s", error)
        return None
    return protocol if protocol["sources"] == _recorded(recipe) else None


def _finished(file: Path, recipe: Recipe) -> Protocol:
    """A protocol that is complete and, if it claims to be the benchmark's at the pinned commit, is that."""
    protocol, names = read_json(file), {field.name for field in dataclasses.fields(Source)}
    sources = protocol.get("sources")
    if not isinstance(sources, list) or any(not isinstance(source, dict) or set(source) != names for source in sources):
        raise AHNError(f"{file}: 'sources' must be a list of objects with {', '.join(sorted(names))}.")
    recipe.check(protocol, str(file))
    if sources == _recorded(recipe) and protocol_digest(protocol) != recipe.digest:
        raise AHNError(
            f"{file} names the benchmark's pinned files as its sources, but its content differs from theirs: "
            f"expected digest {recipe.digest}, found {protocol_digest(protocol)}. "
            f"A protocol of your own needs sources of its own."
        )
    return protocol


def _build(recipe: Recipe, read: Callable[[Source], str]) -> Protocol:
    protocol = {"sources": _recorded(recipe), **recipe.build([read(source) for source in recipe.sources])}
    assert protocol_digest(protocol) == recipe.digest  # of pinned files nothing else can come
    return protocol


def _recorded(recipe: Recipe) -> list[dict[str, str]]:
    return [dataclasses.asdict(source) for source in recipe.sources]


def _write(file: Path, protocol: Protocol) -> None:
    """Cache a protocol, whole or not at all. One that cannot be written is only made again the next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(protocol, ensure_ascii=False, indent=1))
    except (OSError, AHNError) as error:
        logger.warning("The protocol could not be cached in %s: %s", file.parent, error)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ahn" / "protocols"

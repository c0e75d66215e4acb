"""Kept states on disk: one file each, as `AHNCache.save` writes it, with a note of whose it is and how it is found.

The files are the index: it is made anew from them at every start, so that nothing can contradict them. Several engines
with the same model may share a folder. A folder holds states of one model and one configuration.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from ahn.cache import file
from ahn.cache.conversation import AHNCache, load_conversation
from ahn.cache.origin import origin
from ahn.errors import AHNError, reason

ENDING = ".safetensors"
NOTE = "kept"
"""The description's entry that this module writes."""
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Note:
    """How a state is found.

    Attributes:
        owner: whose it is.
        length: tokens that it has read, in the prompts that it is found for.
        digest: of these tokens; see `ahn.serve.engine.prefixes`.
        name: of the conversation that ends with it.
        part_of: the name of the conversation in which it was made; it is forgotten together with it.
        parts: bytes by part, as `AHNCache.bytes_by_part`.
    """

    owner: str
    length: int
    digest: str
    name: str | None
    part_of: str | None
    parts: dict[str, int]

    @property
    def key(self) -> tuple[str, str]:
        """What it has in common with others that have read the same, in other conversations."""
        return self.owner, self.digest

    @classmethod
    def read(cls, content: Any) -> Self:
        """From JSON types that are not to be trusted."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise AHNError("it does not say whose it is")
        note = cls(**content)
        texts = [note.owner, note.digest, *(x for x in (note.name, note.part_of) if x is not None)]
        sizes = [note.length, *(note.parts.values() if isinstance(note.parts, dict) else [None])]
        if not all(isinstance(x, str) for x in texts) or not all(type(x) is int and x >= 0 for x in sizes):
            raise AHNError("what it says of itself makes no sense")
        return note


class StateFiles:
    """The files of one model's states.

    Args:
        directory: made where it is missing; a folder for this model and its settings is made inside.
    """

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.model, self.origin = model, origin(model)
        identity = json.dumps([self.origin, dataclasses.asdict(model.ahn_config)], sort_keys=True, default=list)
        self.directory = directory / f"states-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        self._scanned = -1
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AHNError(f"{self.directory} cannot be made: {reason(error)}.") from error

    def path(self, note: Note) -> Path:
        owner = hashlib.sha256(note.owner.encode()).hexdigest()[:8]
        name = "" if note.name is None else f"-{hashlib.sha256(note.name.encode()).hexdigest()[:16]}"
        return self.directory / f"{owner}-{note.digest}{name}{ENDING}"

    def write(self, cache: AHNCache, note: Note) -> Path:
        """Write a state, whole or not at all."""
        write(cache, note, path := self.path(note), self.origin)
        return path

    def load(self, path: Path) -> AHNCache:
        """Read a state."""
        return load_conversation(path, self.model, self.origin)

    def changed(self) -> bool:
        """Whether files came or went since the latest `paths`, as far as the folder's time says."""
        try:
            return self.directory.stat().st_mtime_ns != self._scanned
        except OSError:
            return False

    def paths(self) -> set[Path] | None:
        """Of all states now; None if the folder cannot be read now."""
        try:
            scanned = self.directory.stat().st_mtime_ns
            paths = {p for p in self.directory.iterdir() if p.suffix == ENDING and not p.name.startswith(".")}
        except OSError as error:
            log.warning("%s cannot be read: %s", self.directory, error)
            return None
        self._scanned = scanned
        return paths

    def note(self, path: Path) -> Note | None:
        """Of a state; None if it cannot be used."""
        try:
            return Note.read(file.describe(path).get(NOTE))
        except AHNError as error:
            self.set_aside(path, error)
            return None

    def set_aside(self, path: Path, reason: Exception) -> bool:
        """Give a damaged file another ending, so that nobody falls over it again; one that cannot be read now stays."""
        if isinstance(reason.__context__, FileNotFoundError):  # another server has deleted it
            return True
        if isinstance(reason.__context__, OSError):  # too many open files, a network's pause
            log.warning("A kept conversation cannot be read: %s", reason)
            return False
        log.warning("A kept conversation cannot be used and is set aside as %s.damaged: %s", path, reason)
        try:
            path.replace(path.with_name(path.name + ".damaged"))
        except OSError as error:
            log.warning("%s cannot be renamed: %s", path, error)
        return True

    def remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be deleted: %s", path, error)

    def touch(self, path: Path) -> None:
        try:
            os.utime(path)
        except OSError:
            log.debug("%s cannot be touched", path)


def write(cache: AHNCache, note: Note, path: Path, of: dict[str, Any]) -> None:
    """Write a state with its note; `of` is the `origin` of its model."""
    tensors, description = cache.content()
    file.write(path, tensors, description | {NOTE: dataclasses.asdict(note)}, of)


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Copies from a GPU to the CPU beside its other work, as soon as what it was given before is done."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield

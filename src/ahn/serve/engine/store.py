"""States of conversations between two requests: found again by what they have read, in memory and on disk.

A state in the store never changes: whoever goes on from it works on a copy, so any number of requests can.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ahn.cache import file
from ahn.cache.conversation import AHNCache, Message
from ahn.cache.origin import origin
from ahn.cache.rows import copied
from ahn.errors import AHNError
from ahn.serve.engine.files import NOTE, Note, StateFiles, beside, write
from ahn.serve.engine.index import KeptState, StateIndex
from ahn.serve.engine.prefixes import Prefixes
from ahn.serve.request import ConversationInfo

NEAR = 256
"""Tokens, left to read, for which it is not worth to look whether another engine has written a better state."""
log = logging.getLogger(__name__)


class StateStore:
    """All states of one model.

    Args:
        directory: None keeps states in memory alone.
        memory: bytes of states in memory. Beyond it the least recently used go to disk, or are forgotten.
        device: bytes of these on the model's device, where that is not the CPU.
        disk: bytes of files; None for no limit.
        max_age: seconds after its last use when a state is forgotten; None for never.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        directory: Path | None,
        memory: int,
        device: int = 0,
        disk: int | None = None,
        max_age: float | None = None,
    ) -> None:
        self.model, self.memory, self.device, self.disk, self.max_age = model, memory, device, disk, max_age
        self.files = None if directory is None else StateFiles(model, directory)
        self.evicted = 0
        self._lock = threading.RLock()
        self._index = StateIndex()
        self._scan()

    # -- finding ---------------------------------------------------------------------------------------------------

    def find(self, owner: str, prompt: Prefixes, limit: int) -> KeptState | None:
        """The state that has read most of what a prompt begins with, at most `limit` tokens of it."""
        state = self._find(owner, prompt, limit)
        if (state is None or state.note.length < limit - NEAR) and self._scan():
            state = self._find(owner, prompt, limit)
        return state

    def _find(self, owner: str, prompt: Prefixes, limit: int) -> KeptState | None:
        with self._lock:
            state = self._index.longest(owner, prompt, limit)
            if state is not None:
                self._use(state)
            return state

    def has(self, owner: str, digest: str) -> bool:
        with self._lock:
            return bool(self._index.alike(owner, digest))

    def discard(self, owner: str, digest: str) -> None:
        with self._lock:
            for state in self._index.alike(owner, digest):
                self._forget(state)

    def named(self, owner: str, name: str) -> KeptState | None:
        """The last state of a conversation with a name."""
        self._scan()
        return self._index.named.get((owner, name))

    def at_hand(self, state: KeptState) -> AHNCache | None:
        """A state itself, which must not be changed, if it lies where the model is."""
        cache = state.cache
        return cache if cache is not None and _device(cache).type == self.model.device.type else None

    def bring(self, state: KeptState) -> tuple[AHNCache, bool]:
        """A state where the model is, from memory or disk; `trim` when there is time.

        Returns:
            The state, and whether it is lent: the kept one itself, which must not be changed.

        Raises:
            AHNError: the file is damaged, and the state forgotten, or cannot be read now.
        """
        if (cache := self.at_hand(state)) is not None:
            return cache, True
        cache, path = state.cache, state.file
        if cache is not None:
            return copied(cache, self.model.device), False
        if self.files is None or path is None:
            raise AHNError("This conversation was forgotten a moment ago.")
        try:
            loaded = self.files.load(path)
        except AHNError as error:
            if self.files.set_aside(path, error):
                self._forget(state)
            raise
        with self._lock:
            keeps = state.file is not None and state.nbytes <= self._room  # not forgotten meanwhile
            if lent := keeps and state.cache is None:  # another request may have brought it too
                state.cache = loaded
                state.used = time.time()  # else it might be the first to leave again
        return loaded, lent

    def open(self, state: KeptState) -> AHNCache:
        """A copy of a state to go on with, where the model is.

        Raises:
            AHNError: as `bring`.
        """
        cache, lent = self.bring(state)
        return copied(cache, self.model.device) if lent else cache

    # -- keeping ---------------------------------------------------------------------------------------------------

    def add(self, note: Note, cache: AHNCache) -> KeptState:
        """Keep a state in memory; it must not be changed any more."""
        with self._lock:
            state = self._index.like(note)
            if state is None:
                self._index.add(state := KeptState(note, cache, None, time.time()))
            else:  # the same tokens were read before
                name, part_of = state.note.name or note.name, note.part_of or state.note.part_of
                if (name, part_of) != (state.note.name, state.note.part_of):
                    self._take_off(state)
                    state.note = dataclasses.replace(state.note, name=name, part_of=part_of)
                    self._index.add(state)
                state.cache = state.cache or cache
                self._use(state)
            if state.note.name is not None:
                self._index.named[state.note.owner, state.note.name] = state
            return state

    def write(self, state: KeptState) -> bool:
        """Bring a state to disk, if there is a folder for it; False if that fails, and it stays in memory."""
        cache = state.cache
        if self.files is None or state.file is not None or cache is None:
            return True
        try:
            with beside(self.model.device):
                path = self.files.write(cache, state.note)
        except AHNError as error:
            log.warning("A conversation stays in memory alone: %s", error)
            return False
        with self._lock:
            state.file = path
            forgotten = state not in self._index
        if forgotten:
            self.files.remove(path)
        self.trim_disk()
        return True

    def trim(self) -> None:
        """Make room in memory: the least recently used states go, to disk first. It may take its time."""
        with self._lock:
            held = [state for state in self._index if state.cache is not None]
        for state in _beyond(held, self.memory)[: len(held) - 1]:  # the latest is about to be used
            self.write(state)
            with self._lock:
                state.cache = None
                if state.file is None:
                    self._index.remove(state)
                self.evicted += 1
        self.leave_device(self.device)

    @property
    def _room(self) -> int:
        """Bytes of states where the model is."""
        return self.memory if self.model.device.type == "cpu" else min(self.memory, self.device)

    def leave_device(self, limit: int) -> None:
        """Of the states on a GPU bring the least recently used to the CPU, down to so many bytes."""
        if self.model.device.type == "cpu":
            return
        with self._lock:
            held = [state for state in self._index if place(state) == "device"]
        for state in _beyond(held, limit):
            if (cache := state.cache) is not None:
                with beside(self.model.device):
                    cache.to("cpu")

    def trim_disk(self) -> None:
        if self.disk is None or self.files is None:
            return
        with self._lock:
            held = [state for state in self._index if state.file is not None]
            if not _beyond(held, self.disk):
                return
            for state in held:
                _last_used(state)
            for state in _beyond(held, self.disk)[: len(held) - 1]:
                assert state.file is not None
                self.files.remove(state.file)
                state.file = None
                if state.cache is None:
                    self._index.remove(state)
                    self.evicted += 1

    def expire(self) -> None:
        """Forget what was not used for too long, or what another engine has forgotten."""
        self._scan()
        if self.max_age is not None:
            oldest = time.time() - self.max_age
            with self._lock:
                for state in [state for state in self._index if state.used < oldest]:
                    if _last_used(state) < oldest:
                        self._forget(state)

    def forget(self, owner: str, name: str) -> bool:
        self._scan()
        with self._lock:
            there = (owner, name) in self._index.named
            for state in [s for s in self._index if s.note.owner == owner and name in (s.note.name, s.note.part_of)]:
                self._forget(state)
            return there

    def save_all(self, seconds: float) -> None:
        """Bring states to disk that are in memory alone, the latest first, as many as there is time for."""
        until = time.monotonic() + seconds
        with self._lock:
            states = sorted(self._index, key=lambda state: -state.used)
        for state in states:
            if time.monotonic() > until or not self.write(state):
                return

    # -- files of a user's -----------------------------------------------------------------------------------------

    def export(self, owner: str, name: str, path: Path, messages: Sequence[Message] = ()) -> None:
        """Write a conversation to a file that `take_in` takes."""
        state = self.named(owner, name)
        if state is None:
            raise AHNError(f"There is no conversation {name!r}.")
        cache = self.open(state)
        cache.messages = list(messages)
        write(cache, state.note, path, origin(self.model))
        self.trim()

    def take_in(self, owner: str, name: str, path: Path) -> list[Message]:
        """Take up a conversation that `export` wrote, of whatever owner and name; returns what was said."""
        cache = AHNCache.load(path, self.model)
        note = Note.read(file.describe(path).get(NOTE))
        if cache.config != self.model.ahn_config or cache.progress.padding is not None:
            raise AHNError(f"{path} was written with other settings of the memory; start the server with those.")
        if cache.rows != 1:
            raise AHNError(f"{path} holds {cache.rows} conversations; one has a file of its own.")
        if note.length != cache.seen:
            raise AHNError(f"{path} is damaged: it has read {cache.seen:,} tokens, and says {note.length:,}.")
        said, cache.messages = cache.messages, []
        own: dict[str, Any] = {"owner": owner, "name": name, "part_of": name, "parts": cache.bytes_by_part()}
        self.write(self.add(dataclasses.replace(note, **own), cache))
        self.trim()
        return said

    # -- counting --------------------------------------------------------------------------------------------------

    def conversations(self, owner: str) -> list[ConversationInfo]:
        """What is kept for an owner, the latest first."""
        self._scan()
        with self._lock:
            own = [state for state in self._index if state.note.owner == owner]
            infos = [ConversationInfo(s.note.name, s.note.length, s.note.parts, place(s), s.used) for s in own]
        return sorted(infos, key=lambda info: -info.used)

    def sizes(self) -> tuple[int, int, int, int]:
        with self._lock:
            memory = [state.nbytes for state in self._index if state.cache is not None]
            disk = [state.nbytes for state in self._index if state.file is not None]
        return len(memory), sum(memory), len(disk), sum(disk)

    # -- the index -------------------------------------------------------------------------------------------------

    def _scan(self) -> bool:
        """Take up files that others have written, and those of an earlier run; whether any file came or went."""
        if self.files is None or not self.files.changed():
            return False
        with self._lock:
            if (there := self.files.paths()) is None:
                return False
            known = {state.file: state for state in self._index if state.file is not None}
            for path in sorted(there - known.keys()):
                if (note := self.files.note(path)) is not None:
                    self._take_up(path, note)
            for path in known.keys() - there:  # another engine has forgotten it
                known[path].file = known[path].cache = None
                self._index.remove(known[path])
        return True

    def _take_up(self, path: Path, note: Note) -> None:
        try:
            used = path.stat().st_mtime
        except OSError:
            return
        same = [state for state in self._index.alike(*note.key) if state.note.name == note.name]
        if not same:
            self._index.add(state := KeptState(note, None, path, used))
        elif (state := same[0]).cache is None:
            state.file = path
        before = None if note.name is None else self._index.named.get((note.owner, note.name))
        if note.name is not None and (before is None or before.used <= used):
            self._index.named[note.owner, note.name] = state

    def _forget(self, state: KeptState) -> None:
        with self._lock:
            self._take_off(state)
            state.cache = None

    def _take_off(self, state: KeptState) -> None:
        """It is no longer found under its note, nor on disk."""
        self._index.remove(state)
        path, state.file = state.file, None
        if path is not None and self.files is not None:
            self.files.remove(path)

    def _use(self, state: KeptState) -> None:
        state.used = time.time()
        if state.file is not None and self.files is not None:
            self.files.touch(state.file)


def _beyond(states: Sequence[KeptState], limit: int) -> list[KeptState]:
    """Those that go so that the others take at most so many bytes: the least recently used."""
    excess, found = sum(state.nbytes for state in states) - limit, []
    for state in sorted(states, key=lambda state: state.used):
        if excess > 0:
            found.append(state)
            excess -= state.nbytes
    return found


def _last_used(state: KeptState) -> float:
    """When a state was last used, by this engine or by another with the same folder."""
    if state.file is not None:
        with contextlib.suppress(OSError):
            state.used = max(state.used, state.file.stat().st_mtime)
    return state.used


def place(state: KeptState) -> Literal["device", "memory", "disk"]:
    cache = state.cache
    if cache is None:
        return "disk"
    return "memory" if _device(cache).type == "cpu" else "device"


def _device(cache: AHNCache) -> torch.device:
    return next(iter(cache.memory_layers.values())).keys.device

"""What is kept of a request that is finished: found out, written and only then said to be finished.

This runs beside the engine's thread: a template is rendered, files are written, and others' steps do not wait for it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ahn.cache.conversation import AHNCache
from ahn.errors import AHNError
from ahn.serve.engine.files import Note
from ahn.serve.engine.index import KeptState
from ahn.serve.engine.jobs import PromptReading, RequestJob
from ahn.serve.engine.prefixes import Prefixes
from ahn.serve.engine.store import StateStore
from ahn.serve.request import Delta

REREAD = 1024
"""Tokens, besides a few times those of the reply, that are read again so that a reply is found as it will be sent."""
log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Rest(PromptReading):
    """What is left to read of a finished conversation before it is kept."""

    job: RequestJob | None = None
    delta: Delta | None = None


class Keeper:
    """Keeps states for an engine.

    Args:
        read: hands tokens that are left to read to the engine's thread, which calls `read_to_end` afterwards.
        done: called after a request's last delta.
    """

    def __init__(self, store: StateStore, read: Callable[[Rest], None], done: Callable[[RequestJob], None]) -> None:
        self.store, self._read, self._done = store, read, done
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="ahn-keep")
        self._opening = ThreadPoolExecutor(max_workers=2, thread_name_prefix="ahn-open")  # never behind what is written

    def finish(self, job: RequestJob, cache: AHNCache | None, delta: Delta) -> None:
        """A request is finished; its last delta comes when what is to be kept of it is safe.

        Args:
            cache: has read all but the last token of prompt and reply; None to keep nothing.
        """
        if cache is None or not cache.seen or not job.request.keep:
            self._over(job, delta)
        else:
            self._pool.submit(self._guarded, self._close, job, cache, delta)

    def read_to_end(self, rest: Rest, failed: bool = False) -> None:
        """What was left is read."""
        assert rest.job is not None and rest.delta is not None
        if failed or rest.cache is None:
            self._over(rest.job, rest.delta)
        else:
            self._pool.submit(self._guarded, self._keep, rest.job, rest.cache, rest.delta, rest.tokens)

    def snapshot(self, tokens: Prefixes, owner: str, length: int, cache: AHNCache, part_of: str | None) -> None:
        """Keep what a prompt begins with."""
        self.store.add(note_of(tokens, owner, length, cache, None, part_of), cache)
        self.trim()

    def trim(self) -> None:
        """Make room, when there is time."""
        self._pool.submit(self.store.trim)

    def open(self, state: KeptState) -> Future[AHNCache]:
        """A copy of a state that is elsewhere, to go on with."""
        return self._opening.submit(self._opened, state)

    def _opened(self, state: KeptState) -> AHNCache:
        cache = self.store.open(state)
        self.trim()
        return cache

    def close(self) -> None:
        """Wait until everything is written."""
        self._opening.shutdown(wait=True)
        self._pool.shutdown(wait=True)

    def _guarded(
        self, work: Callable[..., None], job: RequestJob, cache: AHNCache, delta: Delta, *rest: Prefixes
    ) -> None:
        try:
            work(job, cache, delta, *rest)
        except Exception:
            log.exception("A conversation could not be kept")
            self._over(job, delta)

    def _over(self, job: RequestJob, delta: Delta) -> None:
        job.reply.put(delta)
        self._done(job)

    def _close(self, job: RequestJob, cache: AHNCache, delta: Delta) -> None:
        """Find out which tokens the kept state should have read, and have it read them."""
        own = Prefixes(job.ids[: job.read])
        tokens = self._wanted(job) or own
        if own.shared(tokens) == len(own):
            rest = Rest(job.owner, tokens, len(tokens), cache, len(own), job=job, delta=delta)
        else:
            before = self.store.find(job.owner, tokens, len(tokens))
            start = None if before is None else self.store.open(before)
            read = 0 if before is None else before.note.length
            rest = Rest(job.owner, tokens, len(tokens), start, read, job=job, delta=delta)
        if rest.target - rest.read > 4 * len(job.new) + REREAD:  # what it began with is no longer kept
            self._keep(job, cache, delta, own)
            return
        if rest.read == rest.target and rest.cache is not None:
            self._keep(job, rest.cache, delta, tokens)
        else:
            self._read(rest)

    def _wanted(self, job: RequestJob) -> Prefixes | None:
        """With which tokens a later prompt will begin that goes on from this reply; None for those that are read."""
        if job.request.known_as is not None and job.new:
            try:
                if len(wanted := Prefixes(job.request.known_as(job.reply_ids))):
                    return wanted
            except Exception:
                log.warning("How a reply will be known could not be found out; it is read again", exc_info=True)
        return Prefixes(job.ids[: len(job.prompt) + job.text.whole_tokens()]) if job.text.stopped else None

    def _keep(self, job: RequestJob, cache: AHNCache, delta: Delta, tokens: Prefixes) -> None:
        name = job.request.name
        state = self.store.add(note_of(tokens, job.owner, len(tokens), cache, name, name), cache)
        try:
            self.store.write(state)
        except AHNError as error:
            log.warning("A conversation stays in memory alone: %s", error)
        self._over(job, delta)
        self.store.trim()


def note_of(tokens: Prefixes, owner: str, length: int, cache: AHNCache, name: str | None, part_of: str | None) -> Note:
    """The note of a state that has read the first of some tokens."""
    return Note(owner, *tokens.key(length), name, part_of, cache.bytes_by_part())

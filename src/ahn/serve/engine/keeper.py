"""What is kept of a request that is finished: found out, written and only then said to be finished.

This runs beside the engine's thread: a template is rendered, files are written, and others' steps do not wait for it.
"""

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ahn.cache.conversation import AHNCache
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

    job: RequestJob = dataclasses.field(kw_only=True)
    delta: Delta = dataclasses.field(kw_only=True)


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
            own = Prefixes(job.ids[: job.read])
            self._beside(self._close, Rest(job.owner, own, len(own), cache, len(own), job=job, delta=delta))

    def read_to_end(self, rest: Rest, failed: bool = False) -> None:
        if failed:
            self._over(rest.job, rest.delta)
        else:
            self._beside(self._keep, rest)

    def snapshot(self, tokens: Prefixes, owner: str, length: int, cache: AHNCache, part_of: str | None) -> None:
        self.store.add(note_of(tokens, owner, length, cache, None, part_of), cache)
        self.trim()

    def trim(self) -> None:
        self._pool.submit(self.store.trim)

    def bring(self, state: KeptState) -> Future[tuple[AHNCache, bool]]:
        """A state that is elsewhere, and whether it is lent, as `StateStore.bring`."""
        return self._opening.submit(self._brought, state)

    def _brought(self, state: KeptState) -> tuple[AHNCache, bool]:
        brought = self.store.bring(state)
        self.trim()
        return brought

    def close(self) -> None:
        self._opening.shutdown(wait=True)
        self._pool.shutdown(wait=True)

    def _beside(self, work: Callable[[Rest], None], rest: Rest) -> None:
        """Do it beside the engine's thread; the request is over even if that fails."""

        def run() -> None:
            try:
                work(rest)
            except Exception:
                log.exception("A conversation could not be kept")
                self._over(rest.job, rest.delta)

        self._pool.submit(run)

    def _over(self, job: RequestJob, delta: Delta) -> None:
        job.reply.put(delta)
        self._done(job)

    def _close(self, rest: Rest) -> None:
        """Find out which tokens the kept state should have read, and have it read them."""
        wanted = self._wanted(rest.job) or rest.tokens
        other = dataclasses.replace(rest, tokens=wanted, target=len(wanted))
        if rest.tokens.shared(wanted) < rest.read:
            before = self.store.find(rest.owner, wanted, len(wanted))
            other.cache = None if before is None else self.store.open(before)
            other.read = 0 if before is None else before.note.length
        if other.target - other.read > 4 * len(rest.job.new) + REREAD:  # what it began with is no longer kept
            other = rest
        if other.read == other.target and other.cache is not None:
            self._keep(other)
        else:
            self._read(other)

    def _wanted(self, job: RequestJob) -> Prefixes | None:
        """With which tokens a later prompt will begin that goes on from this reply; None for those that are read."""
        if job.request.known_as is not None and job.new:
            try:
                if len(wanted := Prefixes(job.request.known_as(job.reply_ids))):
                    return wanted
            except Exception:
                log.warning("How a reply will be known could not be found out; it is read again", exc_info=True)
        return Prefixes(job.ids[: len(job.prompt) + job.text.whole_tokens()]) if job.text.stopped else None

    def _keep(self, rest: Rest) -> None:
        name, cache = rest.job.request.name, rest.cache
        assert cache is not None
        state = self.store.add(note_of(rest.tokens, rest.owner, len(rest.tokens), cache, name, name), cache)
        self.store.write(state)
        self._over(rest.job, rest.delta)
        self.store.trim()


def note_of(tokens: Prefixes, owner: str, length: int, cache: AHNCache, name: str | None, part_of: str | None) -> Note:
    return Note(owner, *tokens.key(length), name, part_of, cache.bytes_by_part())

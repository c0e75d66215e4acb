"""What the engine's thread does: it reads prompts in chunks, and between two of them lets all replies take a step.

One thread owns the model. Prompts are read alone, and what is read is a conversation of its own until it joins the
batch with its last token still to be read: the step that reads it gives the reply's first token. Where steps are
captured, a conversation that goes on with a few tokens joins at once. It reads them all in a step of several tokens,
which gives the reply's first token, or, where there is no such step, in steps beside the others.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ahn.cache.conversation import AHNCache
from ahn.errors import is_out_of_memory
from ahn.serve.engine.batch import Batch, make_batch
from ahn.serve.engine.jobs import PromptReading, RequestJob, said
from ahn.serve.engine.keeper import Keeper, Rest
from ahn.serve.engine.pace import finish
from ahn.serve.engine.prefixes import SeenBlocks
from ahn.serve.engine.prompts import WORTH, PromptReader
from ahn.serve.engine.sampling import Chosen, choose
from ahn.serve.engine.store import StateStore
from ahn.serve.request import Delta, FinishReason

WARM = 1 << 16
"""Tokens that are read at most before a server is ready, so that what later chunks need is compiled."""
LATER = 0.5
"""Seconds that a reply may begin later because its prompt is read in steps of many rows, which take longer."""
ATTEMPTS = 2
"""How often a request begins again after a fault that may not be its own: a step that failed, memory that ran out."""
log = logging.getLogger(__name__)


class Scheduler:
    """All requests from their arrival to the end of their replies.

    Attributes:
        tokens_written: since the start.
        seconds: from a request's arrival to its end, on average of late.
    """

    def __init__(self, model: PreTrainedModel, store: StateStore, conversations: int, chunk: int | None) -> None:
        self.model, self.store, self.conversations = model, store, conversations
        self._changed = threading.Event()
        self._inbox: collections.deque[PromptReading] = collections.deque()
        self.waiting: list[RequestJob] = []
        self.reading: list[PromptReading] = []
        self.running: list[RequestJob] = []
        self.batch: Batch | None = None
        self.closing: set[RequestJob] = set()
        self.keeper = Keeper(store, self.put, self._closed)
        self.prompts = PromptReader(model, store, self.keeper, chunk, self.wake)
        self._seen = SeenBlocks()
        self._turns, self.seconds = 0, 1.0
        self._deferring = model.device.type != "cpu"
        self._undelivered: collections.deque[tuple[RequestJob, Chosen]] = collections.deque()
        self._expired = time.monotonic()
        self.tokens_written = 0

    # -- called from other threads ---------------------------------------------------------------------------------

    def put(self, reading: PromptReading) -> None:
        self._inbox.append(reading)
        self._changed.set()

    def wake(self) -> None:
        self._changed.set()

    def _closed(self, job: RequestJob) -> None:
        self.seconds += 0.1 * (time.monotonic() - job.arrived - self.seconds)
        self.closing.discard(job)
        self.wake()

    @property
    def queued(self) -> int:
        """Requests without a row."""
        return len(self._inbox) + len(self.waiting)

    @property
    def taken(self) -> int:
        """Requests that are waited for, whether they have a row or not."""
        everyone = {*self._inbox, *self.waiting, *self.reading, *self.running}
        return sum(isinstance(job, RequestJob) and not job.reply.cancelled for job in everyone)

    @property
    def idle(self) -> bool:
        """There is nothing to do, nor will be unless a request comes."""
        return not (self._inbox or self.waiting or self.reading or self.running or self.closing)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Capture the steps that a GPU repeats, so that no request waits for it."""
        if self.model.device.type == "cpu":
            return
        cache = self.prompts.read_tokens([0] * (min(self.model.ahn_config.lossless, WARM) + 512))
        self.batch = make_batch(self.model, self.conversations, cache)
        self.batch.prepare(cache)

    # -- one turn --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def turn(self) -> None:
        """Take in what has come, read a chunk, take a step; wait if there is nothing to do."""
        self._changed.clear()
        self._collect()
        self._drop_cancelled()
        self._admit()
        busy = self._read()
        self._join()
        busy |= self._step()
        self._expire()
        if not busy:
            self._changed.wait(0.02 if self.waiting or self.reading else 0.5)

    def _collect(self) -> None:
        while self._inbox:
            new = self._inbox[0]
            if isinstance(new, RequestJob):
                if shared := self._seen.add(new.owner, new.tokens):
                    new.cuts.add(min(shared, new.target))
                self.waiting.append(new)
            else:
                self.reading.append(new)
            self._inbox.popleft()

    def _drop_cancelled(self) -> None:
        everyone = [*self.running, *self.waiting, *self.reading]
        for job in [job for job in everyone if isinstance(job, RequestJob) and job.reply.cancelled]:
            self._end(job, "cancelled")

    def _expire(self) -> None:
        if time.monotonic() - self._expired > 1:
            self._expired = time.monotonic()
            self.store.expire()

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give rows to those that wait, in the order of their arrival."""
        for job in list(self.waiting):
            rows = len(self.running) + sum(isinstance(reading, RequestJob) for reading in self.reading)
            if rows >= self.conversations or len(self.closing) > 4 * self.conversations:
                return
            if not self._must_wait(job):
                self.reading.append(job)
                self.waiting.remove(job)
                self._guarded(job, self.prompts.begin)

    def _must_wait(self, job: RequestJob) -> bool:
        """Whether another is about to read what this one begins with."""
        if job.waits_for is not None:
            other, cut = job.waits_for
            if other in self.reading and other.read < cut:
                return True
            job.waits_for = None
        if job.fresh or not job.request.keep:
            return False
        others = [o for o in self.reading if isinstance(o, RequestJob) and o.request.keep and o.owner == job.owner]
        shared = [(min(job.tokens.shared(other.tokens), job.target, other.target), other) for other in others]
        shared = [(cut, other) for cut, other in shared if cut >= WORTH and other.read < cut]
        if not shared:
            return False
        cut, other = max(shared, key=lambda pair: pair[0])
        known = self.store.find(job.owner, job.tokens, job.target)
        if known is not None and known.note.length > cut - WORTH:
            return False
        other.cuts.add(cut)
        job.waits_for = other, cut
        return True

    def _read(self) -> bool:
        """Read one chunk: by turns of the prompt that came first, and of the one of which least is left."""
        ready = [job for job in self.prompts.ready(self.reading) if not self._by_steps(job)]
        if ready and self.prompts.pace.may_read(writing=bool(self.running)):
            self._turns += 1
            shortest = min(ready, key=lambda job: job.target - job.read)
            self._guarded(ready[0] if self._turns % 2 else shortest, self._read_chunk)
        return bool(ready)

    def _read_chunk(self, job: PromptReading) -> None:
        # A step that is captured between layers would record the pauses too; after a fault all are captured anew.
        between = self.batch is not None and self.batch.prepared
        self.prompts.read_chunk(job, self._step if self.running and between else None)
        if isinstance(job, Rest) and job.read == job.target:
            self.reading.remove(job)
            self.keeper.read_to_end(job)

    # -- replies ---------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        for job in [job for job in self.reading if isinstance(job, RequestJob)]:
            if job.arrived_whole and (job.read == job.target or self._by_steps(job)):
                alone, others = job.read < job.target, bool(self.running)
                self._guarded(job, self._start)
                if alone and others and self.batch is not None and self.batch.turns:
                    return  # the others take a step first

    def _by_steps(self, job: PromptReading) -> bool:
        """Whether what is left of a prompt is read in steps: that takes less time, and no time of others' replies."""
        if self.batch is None or job.cache is None or not isinstance(job, RequestJob):
            return False
        left, turns = job.target - job.read, self.batch.turns
        most = turns[-1] - 1 if turns and self.running else self.batch.by_steps  # the prompt's last token is read too
        if not 0 < left <= most or not job.read or job.fresh or not job.request.options.max_tokens:
            return False
        later = left * self.prompts.pace.piece if self.running and not turns else 0.0
        return later <= LATER and not any(job.read < cut < job.target for cut in job.cuts)

    def _start(self, job: RequestJob) -> None:
        if not job.request.options.max_tokens:
            self._end(job, "length", keep=True)
            return
        if not job.read:  # a prompt of a single token: there is nothing yet to join with
            self._advance([job], choose(self.prompts.read_single(job), [job.chooser]))
            if job.finish is not None:
                return
        assert job.cache is not None
        if self.batch is None:
            self.batch = make_batch(self.model, self.conversations, job.cache)
        if not job.new:
            self.prompts.tokens_read += job.target - job.read
        cache, chosen = job.cache, list[Chosen]()
        if self.batch.turns and job.read < job.target:
            cache, logits = self.batch.read_turn(cache, job.tokens.ids[job.read :].tolist())
            chosen = choose(logits, [job.chooser])  # the first token does not wait for the conversation to join
            job.read = len(job.tokens)
        self.batch.add(cache)
        job.cache = None
        self.running.append(job)
        self.reading.remove(job)
        if chosen:
            self._advance([job], chosen)

    def _step(self) -> bool:
        if not self.running:
            return False
        assert self.batch is not None
        start = time.perf_counter()
        rows = [row for row, job in enumerate(self.running) if job.on_last]
        writing = [self.running[row] for row in rows]  # the others still read their prompts
        try:
            logits = self.batch.step([job.next_token for job in self.running])
            self._deliver()
            logits = logits if len(rows) == len(self.running) else logits[rows]
            chosen = choose(logits, [job.chooser for job in writing]) if writing else []
            if not writing:  # which waits for the device, as the step's time has to
                finish(self.model.device)
            self.prompts.pace.stepped(time.perf_counter() - start)
        except Exception as error:
            self._begin_again(error)
            return True
        for job in self.running:
            job.read += 1
        self._advance(writing, chosen)
        return True

    def _advance(self, jobs: Sequence[RequestJob], chosen: Sequence[Chosen]) -> None:
        for job, one in zip(jobs, chosen, strict=True):
            if one.error is not None:
                self._fail(job, one.error)
                continue
            job.take(one.token)
            self.tokens_written += 1
            if self._deferring and job.finish is None and len(job.new) > 1 and not job.request.options.stop:
                self._undelivered.append((job, one))
                continue
            delta = job.delta(one)
            if job.finish is None:
                job.reply.put(delta)
            else:
                self._end(job, job.finish, keep=True, delta=delta)

    def _deliver(self) -> None:
        """Make text of tokens that were left for the time in which a GPU takes the next step."""
        while self._undelivered:
            job, chosen = self._undelivered.popleft()
            job.reply.put(job.delta(chosen))

    # -- ends ------------------------------------------------------------------------------------------------------

    def _end(
        self,
        job: RequestJob,
        finish: FinishReason,
        keep: bool = False,
        delta: Delta | None = None,
        error: str | None = None,
    ) -> None:
        """A request is over, wherever it is."""
        self._deliver()
        self.closing.add(job)
        cache = job.cache
        if job in self.running:
            row = self.running.index(job)
            assert self.batch is not None
            if keep and job.request.keep:
                cache = self._taken(row)
            self.batch.drop(row)
            self.running[row] = self.running[-1]
            self.running.pop()
        for place in (self.waiting, self.reading):
            if job in place:
                place.remove(job)
        delta = job.last(finish, error) if delta is None else delta
        job.cache = None
        self.keeper.finish(job, cache if keep else None, delta)

    def _taken(self, row: int) -> AHNCache | None:
        """A copy of a reply's row; None if there is no memory for it, and nothing can be kept."""
        assert self.batch is not None
        for device in (self.model.device, torch.device("cpu")):  # replies that end together may not fit a GPU
            try:
                return self.batch.take(row, device)
            except torch.OutOfMemoryError:
                log.info("There is no memory for a conversation on %s", device)
        log.warning("There is no memory to keep a conversation; it will be read again")
        self._make_room()
        return None

    def _fail(self, job: RequestJob, error: str) -> None:
        for digest in job.kept:  # what was read may be the reason
            self.store.discard(job.owner, digest)
        self._end(job, "error", error=error)

    def _guarded(self, job: PromptReading, work: Callable[[Any], None]) -> None:
        """What goes wrong with one request is that one's alone."""
        try:
            work(job)
        except Exception as error:
            if isinstance(job, Rest):
                log.exception("What is left of a conversation could not be read; it is not kept")
                self.reading.remove(job)
                self.keeper.read_to_end(job, failed=True)
                return
            assert isinstance(job, RequestJob)
            if is_out_of_memory(error) and job.faults < ATTEMPTS and len(self.reading) + len(self.running) > 1:
                log.warning("Memory ran out; a request waits for others to finish")
                self._put_back(job)
                return
            log.exception("A request failed")
            self._fail(job, said(error))

    def _put_back(self, job: RequestJob) -> None:
        if job in self.reading:
            self.reading.remove(job)
        job.begin_again()
        self.waiting.insert(0, job)
        self._make_room()

    def _make_room(self) -> None:
        self.store.leave_device(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _begin_again(self, error: Exception) -> None:
        """A step failed, for all rows: their states cannot be told from ones that are torn."""
        self._deliver()
        log.error("A step failed; %d replies begin again from what is kept", len(self.running), exc_info=error)
        jobs, self.running = self.running, []
        assert self.batch is not None
        self.batch.clear()
        for job in jobs:
            if job.faults < ATTEMPTS:
                self._put_back(job)
            else:
                self._fail(job, said(error))

    def end_all(self, finish: FinishReason, error: str | None = None) -> None:
        """The thread ends: nobody waits for ever."""
        self._collect()
        for reading in [*self.running, *self.waiting, *self.reading]:
            if isinstance(reading, RequestJob):
                self._end(reading, finish, error=error)
            elif isinstance(reading, Rest):
                self.reading.remove(reading)
                self.keeper.read_to_end(reading, failed=True)

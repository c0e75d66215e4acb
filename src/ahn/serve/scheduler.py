"""What the engine's thread does: it reads prompts in chunks, and between two of them lets all replies take a step.

One thread owns the model. Prompts are read alone, and what is read is a conversation of its own until it joins the
batch with its last token still to be read: the step that reads it gives the reply's first token.
"""

from __future__ import annotations

import collections
import copy
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn import private
from ahn.cache.conversation import AHNCache
from ahn.errors import AHNError
from ahn.measure.reading import CPU_CHUNK
from ahn.serve.batch import Batch, make_batch
from ahn.serve.jobs import Job, Reading, said
from ahn.serve.keeper import Keeper, Rest
from ahn.serve.prefixes import SeenBlocks
from ahn.serve.request import Delta, FinishReason, TokenLogprobs
from ahn.serve.sampling import choose, logprobs_of
from ahn.serve.store import KeptState, StateStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH = 32
"""Tokens from which on a state is kept rather than read anew, and a prompt waits for another that begins as it does."""
GPU_CHUNK = 2048
"""Tokens that a GPU reads in about the time of a step of many conversations."""
ATTEMPTS = 2
"""How often a request begins again after a fault that may not be its own: a step that failed, memory that ran out."""
log = logging.getLogger(__name__)


class Scheduler:
    """All requests from their arrival to the end of their replies.

    Args:
        conversations: rows: requests that are read or written at once.
        chunk: tokens that are read between two steps.

    Attributes:
        tokens_read, tokens_cached, tokens_written: since the start.
        finished: requests by how they finished.
        seconds: from a request's arrival to its end, on average of late.
    """

    def __init__(self, model: PreTrainedModel, store: StateStore, conversations: int, chunk: int | None) -> None:
        self.model, self.store, self.conversations = model, store, conversations
        on_cpu = model.device.type == "cpu"
        self.chunk = chunk or min(model.ahn_config.prefill_chunk_size, CPU_CHUNK if on_cpu else GPU_CHUNK)
        self._empty = AHNCache.for_model(model)
        self._changed = threading.Condition()
        self._inbox: collections.deque[Reading] = collections.deque()
        self.waiting: list[Job] = []
        self.reading: list[Reading] = []
        self.running: list[Job] = []
        self.batch: Batch | None = None
        self.closing: set[Job] = set()
        self.keeper = Keeper(store, self.put, self._closed)
        self._seen = SeenBlocks()
        self._turns, self.seconds = 0, 1.0
        self._expired = time.monotonic()
        self.tokens_read = self.tokens_cached = self.tokens_written = 0
        self.finished: collections.Counter[str] = collections.Counter()

    # -- called from other threads ---------------------------------------------------------------------------------

    def put(self, reading: Reading) -> None:
        """New work."""
        with self._changed:
            self._inbox.append(reading)
            self._changed.notify_all()

    def wake(self) -> None:
        """Something has changed."""
        with self._changed:
            self._changed.notify_all()

    def _closed(self, job: Job) -> None:
        assert job.finish is not None
        self.finished[job.finish] += 1
        self.seconds += 0.1 * (time.monotonic() - job.arrived - self.seconds)
        self.closing.discard(job)
        self.wake()

    @property
    def queued(self) -> int:
        """Requests without a row."""
        return len(self._inbox) + len(self.waiting)

    @property
    def idle(self) -> bool:
        """There is nothing to do, nor will be unless a request comes."""
        return not (self._inbox or self.waiting or self.reading or self.running or self.closing)

    # -- one turn --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def turn(self) -> None:
        """Take in what has come, read a chunk, take a step; wait if there is nothing to do."""
        self._collect()
        self._drop_cancelled()
        self._admit()
        busy = self._read()
        self._join()
        busy |= self._step()
        self._expire()
        if not busy:
            with self._changed:
                if not self._inbox:
                    self._changed.wait(0.02 if self.waiting or self.reading else 0.5)

    def _collect(self) -> None:
        while self._inbox:
            new = self._inbox[0]
            if isinstance(new, Job):
                if shared := self._seen.add(new.owner, new.tokens):
                    new.cuts.add(min(shared, new.target))
                self.waiting.append(new)
            else:
                self.reading.append(new)
            self._inbox.popleft()

    def _drop_cancelled(self) -> None:
        everyone = [*self.running, *self.waiting, *self.reading]
        for job in [job for job in everyone if isinstance(job, Job) and job.reply.cancelled]:
            self._end(job, "cancelled")

    def _expire(self) -> None:
        if time.monotonic() - self._expired > 1:
            self._expired = time.monotonic()
            self.store.expire()

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give rows to those that wait, in the order of their arrival."""
        for job in list(self.waiting):
            rows = len(self.running) + sum(isinstance(reading, Job) for reading in self.reading)
            if rows >= self.conversations or len(self.closing) > 4 * self.conversations:
                return
            if not self._must_wait(job):
                self.reading.append(job)
                self.waiting.remove(job)
                self._guarded(job, self._begin)

    def _must_wait(self, job: Job) -> bool:
        """Whether another is about to read what this one begins with."""
        if job.waits_for is not None:
            other, cut = job.waits_for
            if other in self.reading and other.read < cut:
                return True
            job.waits_for = None
        if job.fresh or not job.request.keep:
            return False
        others = [o for o in self.reading if isinstance(o, Job) and o.request.keep and o.owner == job.owner]
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

    def _begin(self, job: Job) -> None:
        """Find what is known of a prompt."""
        known = None if job.fresh else self.store.find(job.owner, job.tokens, job.target)
        self._go_on_from(job, known)
        if job.target - job.read >= WORTH:
            job.cuts.add(job.target)

    def _go_on_from(self, job: Job, known: KeptState | None) -> None:
        job.read = 0 if known is None else known.note.length
        if not job.written:
            self.tokens_cached += job.read - job.cached
            job.cached = job.read
        if known is None:
            job.cache = copy.deepcopy(self._empty)
        else:
            job.loading = self.keeper.open(known)

    def _ready(self) -> list[Reading]:
        """Those that have something to read; states that were on their way have arrived."""
        for job in self.reading:
            if isinstance(job, Job) and job.loading is not None and job.loading.done():
                loading, job.loading = job.loading, None
                error = loading.exception()
                if error is None:
                    job.cache = loading.result()
                else:
                    log.warning("A prompt is read anew: %s", error)
                    self._go_on_from(job, None)
        return [job for job in self.reading if job.read < job.target and not getattr(job, "loading", None)]

    def _read(self) -> bool:
        """Read one chunk: by turns of the prompt of which least is left, and of the one that came first."""
        ready = self._ready()
        if ready:
            self._turns += 1
            shortest = min(ready, key=lambda job: job.target - job.read)
            self._guarded(ready[0] if self._turns % 2 else shortest, self._read_chunk)
        return bool(ready)

    def _read_chunk(self, job: Reading) -> None:
        if job.cache is None:
            job.cache = copy.deepcopy(self._empty)
        stop, first = job.next_stop(self.chunk), job.read
        all_logits = isinstance(job, Job) and job.fresh
        logits = self._forward(job.cache, job.tokens.ids[first:stop].tolist(), 0 if all_logits else 1)
        job.read = stop
        if isinstance(job, Job):
            self.tokens_read += 0 if job.written else stop - first
            if all_logits:
                self._note_logprobs(job, logits, first)
            if not job.written:
                job.reply.put(job.progress())
        if stop in job.cuts:
            job.cuts.discard(stop)
            self._snapshot(job, stop)
        if isinstance(job, Rest) and job.read == job.target:
            self.reading.remove(job)
            self.keeper.read_to_end(job)

    def _forward(self, cache: AHNCache, ids: list[int], keep: int) -> Tensor:
        tokens = torch.tensor([ids], device=self.model.device)
        logits: Tensor = self.model(
            input_ids=tokens, use_cache=True, logits_to_keep=keep, **{private.CACHE: cache}
        ).logits[0]
        return logits

    def _snapshot(self, job: Reading, length: int) -> None:
        digest = job.tokens.key(length)[1]
        if isinstance(job, Job) and job.request.keep and not self.store.has(job.owner, digest):
            assert job.cache is not None
            job.kept.append(digest)
            self.keeper.snapshot(job.tokens, job.owner, length, copy.deepcopy(job.cache), job.request.name)

    def _note_logprobs(self, job: Job, logits: Tensor, first: int) -> None:
        count = job.request.options.prompt_logprobs or 0
        if not first:
            job.prompt_logprobs.append(TokenLogprobs(job.ids[0], None))
        logprobs = logits.float().log_softmax(-1)
        if not bool(logprobs.isfinite().all()):
            raise AHNError("The model's scores are not numbers.")
        following = job.ids[first + 1 : first + 1 + len(logits)]
        job.prompt_logprobs += [logprobs_of(own, token, count) for own, token in zip(logprobs, following, strict=True)]

    # -- replies ---------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Those whose prompt is read go on with a reply."""
        for job in [job for job in self.reading if isinstance(job, Job)]:
            if job.read == job.target and job.loading is None:
                self._guarded(job, self._start)

    def _start(self, job: Job) -> None:
        if not job.request.options.max_tokens:
            self._end(job, "length", keep=True)
            return
        if job.cache is None or not job.cache.seen:  # a prompt of a single token: there is nothing yet to join with
            job.cache = copy.deepcopy(self._empty)
            logits = self._forward(job.cache, job.ids[:1], 1)
            job.read = 1
            if job.fresh:
                job.prompt_logprobs.append(TokenLogprobs(job.ids[0], None))
            if not self._advance([job], logits):
                return
        if self.batch is None:
            self.batch = make_batch(self.model, self.conversations, job.cache)
        if self.model.device.type != "cpu":
            job.cache.to(self.model.device)
        self.batch.add(job.cache)
        job.cache = None
        self.running.append(job)
        self.reading.remove(job)

    def _step(self) -> bool:
        """All replies take a step."""
        if not self.running:
            return False
        assert self.batch is not None
        try:
            logits = self.batch.step([job.ids[-1] for job in self.running])
        except Exception as error:
            self._begin_again(error)
            return True
        for job in self.running:
            job.read += 1
        self._advance(list(self.running), logits)
        return True

    def _advance(self, jobs: list[Job], logits: Tensor) -> bool:
        """Choose the next token of each; whether the first of them goes on."""
        for job, chosen in zip(jobs, choose(logits, [job.chooser for job in jobs]), strict=True):
            if chosen.error is not None:
                self._fail(job, chosen.error)
                continue
            delta = job.take(chosen)
            self.tokens_written += 1
            if delta.finish is None:
                job.reply.put(delta)
            else:
                self._end(job, delta.finish, keep=True, delta=delta)
        return jobs[0].finish is None

    # -- ends ------------------------------------------------------------------------------------------------------

    def _end(
        self, job: Job, finish: FinishReason, keep: bool = False, delta: Delta | None = None, error: str | None = None
    ) -> None:
        """A request is over, wherever it is."""
        self.closing.add(job)
        cache = job.cache
        if job in self.running:
            row = self.running.index(job)
            assert self.batch is not None
            if keep and job.request.keep:
                cache = self.batch.take(row)
            self.batch.drop(row)
            self.running[row] = self.running[-1]
            self.running.pop()
        for place in (self.waiting, self.reading):
            if job in place:
                place.remove(job)
        delta = job.last(finish, error) if delta is None else delta
        job.cache = None
        self.keeper.finish(job, cache if keep else None, delta)

    def _fail(self, job: Job, error: str) -> None:
        for digest in job.kept:  # what was read may be the reason
            self.store.discard(job.owner, digest)
        self._end(job, "error", error=error)

    def _guarded(self, job: Reading, work: Callable[[Any], None]) -> None:
        """What goes wrong with one request is that one's alone."""
        try:
            work(job)
        except Exception as error:
            if isinstance(job, Rest):
                log.exception("What is left of a conversation could not be read; it is not kept")
                self.reading.remove(job)
                self.keeper.read_to_end(job, failed=True)
                return
            assert isinstance(job, Job)
            if (
                isinstance(error, torch.OutOfMemoryError)
                and job.faults < ATTEMPTS
                and len(self.reading) + len(self.running) > 1
            ):
                log.warning("Memory ran out; a request waits for others to finish")
                self._put_back(job)
                return
            log.exception("A request failed")
            self._fail(job, said(error))

    def _put_back(self, job: Job) -> None:
        if job in self.reading:
            self.reading.remove(job)
        job.begin_again()
        self.waiting.insert(0, job)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _begin_again(self, error: Exception) -> None:
        """A step failed, for all rows: their states cannot be told from ones that are torn."""
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
            if isinstance(reading, Job):
                self._end(reading, finish, error=error)
            elif isinstance(reading, Rest):
                self.reading.remove(reading)
                self.keeper.read_to_end(reading, failed=True)

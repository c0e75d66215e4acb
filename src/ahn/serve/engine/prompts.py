"""How prompts are read: what is known of them is found, and the rest is read in chunks, each prompt alone."""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn import private
from ahn.cache.conversation import AHNCache
from ahn.cache.rows import copied
from ahn.decode.compiled import leaves_fused
from ahn.errors import AHNError
from ahn.measure.reading import CPU_CHUNK
from ahn.model.support import decoder_layers
from ahn.serve.engine.index import KeptState
from ahn.serve.engine.jobs import PromptReading, RequestJob
from ahn.serve.engine.keeper import Keeper
from ahn.serve.engine.pace import LayerPauses, Pace, finish
from ahn.serve.engine.prefixes import Prefixes
from ahn.serve.engine.sampling import logprobs_of
from ahn.serve.engine.store import StateStore
from ahn.serve.request import TokenLogprobs

WORTH = 32
"""Tokens from which on a state is kept rather than read anew, and a prompt waits for another that begins as it does."""
APART = 4
"""Copies of kept states, beside the batch, whose requests are about to join it: many that fork one would fill a GPU."""
GPU_CHUNK = 8192
"""Tokens that a GPU reads at once while nobody writes."""
SMALLEST = {"cpu": 32, "cuda": 512}
"""Tokens of a chunk between two steps: fewer take no less time."""
FUSED = 4096
"""Tokens from which on a GPU gains more by compiled norms, rotations and MLPs than its host loses by calling them."""
SCORES = 256
"""Tokens whose scores of the whole vocabulary are worked with at once."""
log = logging.getLogger(__name__)


class PromptReader:
    """Reads for the engine's thread.

    Args:
        chunk: tokens that are read at once while nobody writes; None takes what suits the device.
        news: called when a state has arrived.

    Attributes:
        tokens_read, tokens_cached: of prompts, since the start: read, and found to have been read before.
    """

    def __init__(
        self, model: PreTrainedModel, store: StateStore, keeper: Keeper, chunk: int | None, news: Callable[[], None]
    ) -> None:
        self.model, self.store, self.keeper, self._news = model, store, keeper, news
        on_cpu = model.device.type == "cpu"
        largest = chunk or min(model.ahn_config.chunk, CPU_CHUNK if on_cpu else GPU_CHUNK)
        self.pace = Pace(largest, SMALLEST.get(model.device.type, 512))
        self.tokens_read = self.tokens_cached = 0
        self._layers = decoder_layers(model)[1]
        self._empty = AHNCache.for_model(model)  # with the settings of now, whatever the model's will be

    def begin(self, job: RequestJob) -> None:
        known = None if job.fresh else self.store.find(job.owner, job.tokens, job.target)
        self._go_on_from(job, known)
        if job.target - job.read >= WORTH:
            job.cuts.add(job.target)

    def _go_on_from(self, job: RequestJob, known: KeptState | None) -> None:
        job.read = 0 if known is None else known.note.length
        if not job.new:
            self.tokens_cached += job.read - job.cached
            job.cached = job.read
        job.known = known

    def ready(self, readings: Sequence[PromptReading]) -> list[PromptReading]:
        """Those that have something to read; states that were on their way have arrived."""
        jobs = [job for job in readings if isinstance(job, RequestJob)]
        about_to_join = sum(job.loading is not None or self._soon_read(job) for job in jobs)
        for job in jobs:
            if job.known is not None and (cache := self.store.at_hand(job.known)) is not None:
                job.cache, job.lent, job.known = cache, True, None
            elif job.known is not None and about_to_join < APART:
                job.loading, job.known = self.keeper.bring(job.known), None
                job.loading.add_done_callback(lambda _: self._news())
                about_to_join += 1
            if job.loading is not None and job.loading.done():
                self._arrived(job, job.loading)
        there = (job for job in readings if not isinstance(job, RequestJob) or job.arrived_whole)
        return [job for job in there if job.read < job.target]

    def _soon_read(self, job: RequestJob) -> bool:
        return job.cache is not None and not job.lent and job.target - job.read <= self.pace.largest

    def _arrived(self, job: RequestJob, loading: Future[tuple[AHNCache, bool]]) -> None:
        job.loading = None
        error = loading.exception()
        if error is None:
            job.cache, job.lent = loading.result()
        else:
            log.warning("A prompt is read anew: %s", error)
            self._go_on_from(job, None)

    def read_chunk(self, job: PromptReading, step: Callable[[], object] | None) -> None:
        """Read the next tokens, and keep a copy where one is wanted.

        Args:
            step: what replies do that wait for it; None if there are none.
        """
        stop, first = job.next_stop(self.pace.chunk(step is not None)), job.read
        all_logits = isinstance(job, RequestJob) and job.fresh
        logits = self._forward_with_pauses(job, stop, 0 if all_logits else 1, step)
        if isinstance(job, RequestJob):
            if all_logits:
                _note_logprobs(job, logits, first)
            if not job.new:
                self.tokens_read += stop - first
                job.reply.put(job.progress())
        if stop in job.cuts:
            job.cuts.discard(stop)
            self._snapshot(job, stop)

    def _forward_with_pauses(
        self, job: PromptReading, stop: int, keep: int, step: Callable[[], object] | None
    ) -> Tensor:
        first = job.read
        if step is None:
            logits = self._forward(job, stop, keep)
            finish(self.model.device)  # whoever comes meanwhile waits for this chunk, not for all of the prompt
            return logits
        pauses = LayerPauses(self._layers, self.pace, step, self.model.device)
        with pauses.hooked():
            logits = self._forward(job, stop, keep)
        self.pace.read(stop - first, pauses.layer, time.perf_counter() - pauses.since)
        return logits

    def read_single(self, job: RequestJob) -> Tensor:
        """Read a prompt's only token; logits (1, V) of the next one."""
        if job.fresh:
            job.prompt_logprobs.append(TokenLogprobs(job.next_token, None))
        return self._forward(job, 1, 1)

    def read_tokens(self, ids: Sequence[int]) -> AHNCache:
        reading = PromptReading("", Prefixes(ids), len(ids))
        self._forward(reading, len(ids), 1)
        assert reading.cache is not None
        return reading.cache

    def _forward(self, job: PromptReading, stop: int, keep: int) -> Tensor:
        """Logits (n, V) of the last `keep` tokens up to `stop`, of all for 0."""
        if job.cache is None:
            job.cache = copy.deepcopy(self._empty)
        elif job.lent:
            job.cache, job.lent = copied(job.cache, self.model.device), False
        tokens = torch.tensor([job.tokens.ids[job.read : stop].tolist()], device=self.model.device)
        options = {"use_cache": True, "logits_to_keep": keep, private.CACHE: job.cache}
        with leaves_fused(self.model) if stop - job.read >= FUSED else contextlib.nullcontext():
            logits: Tensor = self.model(input_ids=tokens, **options).logits[0]
        job.read = stop
        return logits

    def _snapshot(self, job: PromptReading, length: int) -> None:
        digest = job.tokens.key(length)[1]
        if isinstance(job, RequestJob) and job.request.keep and not self.store.has(job.owner, digest):
            assert job.cache is not None
            job.kept.append(digest)
            self.keeper.snapshot(job.tokens, job.owner, length, copy.deepcopy(job.cache), job.request.name)


def _note_logprobs(job: RequestJob, logits: Tensor, first: int) -> None:
    count = job.request.options.prompt_logprobs or 0
    if not first:
        job.prompt_logprobs.append(TokenLogprobs(int(job.prompt[0]), None))
    for start in range(0, len(logits), SCORES):
        scores = logits[start : start + SCORES].float()
        if not bool(scores.isfinite().all()):
            raise AHNError("The model's scores are not numbers.")
        following = job.prompt[first + start + 1 : first + start + 1 + len(scores)].tolist()
        job.prompt_logprobs += logprobs_of(scores, following, [count] * len(scores))

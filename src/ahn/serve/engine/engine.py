"""The engine of `ahn serve`: many conversations with one model, each of a fixed number of bytes.

`submit` may be called from any thread; a thread of the engine's own owns the model. Other threads may use the model
meanwhile (`ahn.disabled` included): what they do holds for their threads alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ahn.errors import AHNError
from ahn.evaluation.reader import end_tokens
from ahn.files import expanded
from ahn.serve.engine.jobs import RequestJob
from ahn.serve.engine.reply import Reply
from ahn.serve.engine.scheduler import Scheduler
from ahn.serve.engine.store import StateStore
from ahn.serve.request import EngineBusy, EngineStats, GenerationRequest, SamplingOptions
from ahn.wrappers import attached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Engine", "EngineBusy", "Reply"]
FAULTS = 3
"""Turns of the engine's thread that fail one after the other before it gives up."""
log = logging.getLogger(__name__)


class Engine:
    """Reads prompts and writes replies for many at once.

    Args:
        model: with an AHN, where it is to run.
        conversations: requests that are read or written at once.
        state_dir: where conversations are kept on disk; None keeps them in memory alone.
        state_bytes: of conversations in memory between two requests.
        device_bytes: how many of these bytes may lie on a GPU.
        disk_bytes: of files; None for no limit.
        max_age: seconds after its last use when a conversation is forgotten; None for never.
        queue: requests that may wait, beyond those that have a row at once.
        max_prompt: tokens of the longest prompt.
        chunk: tokens of a prompt that are read at once while nobody writes; None takes what suits the device.

    Attributes:
        store: the conversations between two requests, for any thread to list, forget, bring out and take in.

    Raises:
        AHNError: the model has no AHN, or `state_dir` cannot be made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        conversations: int = 8,
        state_dir: Path | None = None,
        state_bytes: int = 2 << 30,
        device_bytes: int = 0,
        disk_bytes: int | None = None,
        max_age: float | None = None,
        queue: int = 256,
        max_prompt: int = 1 << 20,
        chunk: int | None = None,
    ) -> None:
        self.model, self.tokenizer = attached(model).eval(), tokenizer
        self.queue, self.max_prompt = queue, max_prompt
        self.ends = sorted(end_tokens(self.model, tokenizer))
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        directory = None if state_dir is None else expanded(state_dir)
        self.store = StateStore(self.model, directory, state_bytes, device_bytes, disk_bytes, max_age)
        self.scheduler = Scheduler(self.model, self.store, conversations, chunk)
        self._thread = threading.Thread(target=self._run, name="ahn-engine", daemon=True)
        self._ready: Future[None] = Future()
        self._closing = self._stop = self._dead = False

    def start(self) -> None:
        """Begin to work.

        Raises:
            AHNError: a GPU has no memory for so many conversations.
        """
        self._thread.start()
        self._ready.result()

    def alive(self) -> bool:
        """Whether requests are worked on."""
        return self._thread.is_alive() and not self._dead

    def submit(self, request: GenerationRequest) -> Reply:
        """Begin a reply.

        Raises:
            EngineBusy: too many wait, or the engine is closing.
            AHNError: the request cannot be done.
        """
        ids = self._check(request)
        if self._closing or self._dead:
            raise EngineBusy("The server is stopping.", 5.0)
        if (waiting := self.scheduler.taken - self.scheduler.conversations) >= self.queue:
            rounds = math.ceil(waiting / self.scheduler.conversations)
            raise EngineBusy(f"{waiting} requests are waiting already.", max(1.0, rounds * self.scheduler.seconds))
        reply = Reply()
        job = RequestJob(request, ids, reply, self.tokenizer, self.ends, self.model.device)
        reply.on_cancel = self.scheduler.wake
        self.scheduler.put(job)
        if self._dead:  # it died meanwhile
            self.scheduler.end_all("error", "The server's engine has stopped.")
        return reply

    def stats(self) -> EngineStats:
        """Counts of now, and since the engine was made."""
        s = self.scheduler
        in_memory, bytes_in_memory, on_disk, bytes_on_disk = self.store.sizes()
        return EngineStats(
            waiting=s.queued,
            running=len(s.running) + len(s.reading),
            in_memory=in_memory,
            on_disk=on_disk,
            bytes_in_memory=bytes_in_memory,
            bytes_on_disk=bytes_on_disk,
            tokens_read=s.prompts.tokens_read,
            tokens_cached=s.prompts.tokens_cached,
            tokens_written=s.tokens_written,
            evicted=self.store.evicted,
        )

    def close(self, timeout: float = 30.0) -> None:
        """Take no new requests, finish those there are within `timeout` seconds, cancel the rest, save what is kept."""
        self._closing = True
        until = time.monotonic() + timeout
        while self.alive() and not self.scheduler.idle and time.monotonic() < until:
            time.sleep(0.01)
        self._stop = True
        self.scheduler.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self.scheduler.keeper.close()
        self.scheduler.end_all("cancelled")
        self.store.save_all(timeout)

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        faults = 0
        if not self._warm():
            return
        while not self._stop:
            try:
                self.scheduler.turn()
                faults = 0
            except Exception:
                faults += 1
                log.exception("The engine's thread failed")
                self.scheduler.end_all("error", "The server's engine failed.")
                if faults >= FAULTS:
                    self._dead = True
                    break
        self.scheduler.end_all("cancelled")

    def _warm(self) -> bool:
        try:
            self.scheduler.warm_up()
        except torch.OutOfMemoryError:
            rows = self.scheduler.conversations
            self._ready.set_exception(AHNError(f"There is no memory for {rows} conversations at once; ask for fewer."))
            return False
        except Exception as error:
            self._ready.set_exception(error)
            return False
        self._ready.set_result(None)
        return True

    def _check(self, request: GenerationRequest) -> NDArray[np.integer[Any]]:
        """The prompt's ids, (L,)."""
        length = len(request.prompt)
        if not 0 < length <= self.max_prompt:
            raise AHNError(f"A prompt has 1 to {self.max_prompt:,} tokens here, this one has {length:,}.")
        try:
            ids = np.asarray(request.prompt)
        except (TypeError, ValueError, OverflowError) as error:
            raise AHNError("A prompt is a list of token ids.") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.vocabulary:
            raise AHNError(f"Token ids are whole numbers from 0 to {self.vocabulary - 1} for this model.")
        check_options(request.options, self.vocabulary)
        return ids


def check_options(o: SamplingOptions, vocabulary: int) -> None:
    """Raises AHNError for a number that is out of range."""
    limits = {
        "max_tokens": (o.max_tokens, 0, math.inf),
        "temperature": (o.temperature, 0, 100),
        "top_p": (o.top_p, 0, 1),
        "top_k": (o.top_k, 0, math.inf),
        "min_p": (o.min_p, 0, 1),
        "repetition_penalty": (o.repetition_penalty, 1e-3, 100),
        "presence_penalty": (o.presence_penalty, -100, 100),
        "frequency_penalty": (o.frequency_penalty, -100, 100),
        "logprobs": (o.logprobs or 0, 0, vocabulary),
        "prompt_logprobs": (o.prompt_logprobs or 0, 0, vocabulary),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:  # NaN neither
            raise AHNError(f"{name} must be from {low:g} to {high:g}, got {value}.")
    for token, bias in o.logit_bias.items():
        if not 0 <= token < vocabulary or not math.isfinite(bias):
            raise AHNError(f"logit_bias is for token ids from 0 to {vocabulary - 1}, got {token}: {bias}.")

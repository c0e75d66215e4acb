"""The engine of `ahn serve`: many conversations with one model, each of a fixed number of bytes.

`submit` may be called from any thread; a thread of the engine's own owns the model. Other threads may use the model
meanwhile (`ahn.disabled` included): what they do holds for their threads alone.
"""

import logging
import math
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ahn.errors import AHNError, is_out_of_memory
from ahn.evaluation.reader import end_tokens
from ahn.files import expanded
from ahn.serve.engine.jobs import RequestJob
from ahn.serve.engine.reply import Reply
from ahn.serve.engine.scheduler import Scheduler
from ahn.serve.engine.store import StateStore
from ahn.serve.request import EngineBusy, EngineStats, GenerationRequest
from ahn.wrappers import attached

__all__ = ["Engine", "EngineBusy"]
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
        chunk: tokens of a prompt that are read at once while nobody writes; None takes what suits the device.

    Attributes:
        store: the conversations between two requests, for any thread to list, forget, bring out and take in.
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
        chunk: int | None = None,
    ) -> None:
        self.model, self.tokenizer = attached(model).eval(), tokenizer
        self.queue = queue
        self.ends = sorted(end_tokens(self.model, tokenizer))
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        directory = None if state_dir is None else expanded(state_dir)
        self.store = StateStore(self.model, directory, state_bytes, device_bytes, disk_bytes, max_age)
        self.scheduler = Scheduler(self.model, self.store, conversations, chunk)
        self._thread = threading.Thread(target=self._run, name="ahn-engine", daemon=True)
        self._ready: Future[None] = Future()
        self._closing = self._stop = self._dead = False

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()
        self._ready.result()

    def alive(self) -> bool:
        return self._thread.is_alive() and not self._dead

    def submit(self, request: GenerationRequest) -> Reply:
        """Begin a reply.

        Raises:
            EngineBusy: too many wait, or the engine is closing.
            AHNError: it names a token that this model has not.
        """
        ids, biased = np.asarray(request.prompt), request.options.logit_bias
        if ids.min() < 0 or max(ids.max(), *biased, 0) >= self.vocabulary:
            raise AHNError(f"Token ids, in logit_bias too, are from 0 to {self.vocabulary - 1} for this model.")
        if self._closing or self._dead:
            raise EngineBusy("The server is stopping.", 5.0)
        if (waiting := self.scheduler.taken - self.scheduler.conversations) >= self.queue:
            rounds = math.ceil(waiting / self.scheduler.conversations)
            raise EngineBusy(f"{waiting} requests are waiting already.", max(1.0, rounds * self.scheduler.seconds))
        reply = Reply()
        reply.on_cancel = self.scheduler.wake
        self.scheduler.put(RequestJob(request, ids, reply, self.tokenizer, self.ends, self.model.device))
        if self._dead:  # it died meanwhile
            self.scheduler.end_all("error", "The server's engine has stopped.")
        return reply

    def stats(self) -> EngineStats:
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
        try:
            self.scheduler.warm_up()
        except Exception as error:
            rows = self.scheduler.conversations
            full = AHNError(f"There is no memory for {rows} conversations at once; ask for fewer.")
            self._ready.set_exception(full if is_out_of_memory(error) else error)
            return
        self._ready.set_result(None)
        faults = 0
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

"""Our own server in this process, and what a client cannot do: move states, drop files from memory, take bare steps."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import ahn
from ahn import tiny
from ahn.bench.model import load
from ahn.measure.clock import synchronize
from ahn.serve.api.app import StoppingServer, make_app
from ahn.serve.api.building import bound, build
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.service import Service
from ahn.serve.api.settings import ServerSettings
from ahn.serve.engine import scheduler
from ahn.serve.engine.batch import Batch, make_batch
from ahn.serve.engine.engine import Engine
from ahn.serve.engine.store import KeptState

GIB = 1 << 30
LONGEST = 1 << 24
"""Tokens of a prompt that is taken."""


class AnyTokens:
    """The shipped tokenizer, for ids of any vocabulary: decoding takes the time that it takes."""

    eos_token_id = None

    def __init__(self) -> None:
        self._own = AutoTokenizer.from_pretrained(tiny.path())

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        text: str = self._own.decode([token % len(self._own) for token in ids], **options)
        return text


def made_model(source: dict[str, Any], config: dict[str, Any]) -> PreTrainedModel:
    """A model with a new memory, where there is a GPU on it.

    Args:
        source: `model`, as of ahn bench.
        config: of the memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = load(source["model"], False, device, dtype).model
    torch.manual_seed(0)  # every replica has the same memory: states of another would mean nothing to it
    return ahn.attach(base, ahn.AHNConfig(**config))


def service_of(
    source: dict[str, Any], config: dict[str, Any], bounds: dict[str, Any], sizes: Sequence[int], store: MessageStore
) -> Service:
    """A service whose engine works, as `ahn serve` makes one.

    Args:
        bounds: of the engine.
        sizes: numbers of rows for which steps are captured; a server takes powers of two, each costs seconds.
        store: last, as replicas call this.
    """
    model, tokenizer = made_model(source, config), AnyTokens()
    scheduler.make_batch = lambda *given: _of_sizes(make_batch(*given), sizes)
    engine = Engine(model, tokenizer, **bounds)  # type: ignore[arg-type]
    settings = ServerSettings(model="served", prompt=LONGEST)
    service = build(model, tokenizer, engine, settings, store)  # type: ignore[arg-type]
    engine.start()
    return service


def _of_sizes(batch: Batch, sizes: Sequence[int]) -> Batch:
    batch.sizes = sorted({size for size in sizes if size < batch.sizes[-1]} | {batch.sizes[-1]})
    return batch


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """The URL at which an app is served while the block runs."""
    place = bound("127.0.0.1", 0)
    server = StoppingServer(app, 5.0, log_level="warning", lifespan="on")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class OwnServer:
    """A served model and its engine."""

    def __init__(self, service: Service) -> None:
        self.service, self.engine = service, service.engine
        self.model, self.store = self.engine.model, self.engine.store

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """The URL at which it is served while the block runs."""
        with listening(make_app(self.service)) as url:
            yield url

    def settle(self) -> None:
        """Wait until nothing is written or moved any more."""
        until = time.monotonic() + 60
        while not self.engine.scheduler.idle and time.monotonic() < until:
            time.sleep(0.01)
        self.store.trim()
        synchronize(self.model.device)

    def move(self, place: str) -> None:
        """Bring all kept states to "device", "memory" (of the CPU), "disk" (which the system still has in memory), or
        "cold" (on the disk alone).
        """
        self.settle()
        for state in self.states():
            if place in ("disk", "cold"):
                self.store.write(state)
                state.cache = None
            elif state.cache is None or place == "device":
                state.cache = self.store.open(state)
            if place == "cold":
                _drop(state.file)
        if place == "memory":
            self.store.leave_device(0)

    def states(self) -> list[KeptState]:
        """All that are kept."""
        return list(self.store._index)

    @property
    def reads_turns(self) -> bool:
        """Whether a turn of few tokens is read in captured steps of several."""
        batch = self.engine.scheduler.batch
        return batch is not None and bool(batch.turns)

    @contextlib.contextmanager
    def token_by_token(self) -> Iterator[None]:
        """Inside the block such turns are read by a captured step for each token, as it was before."""
        batch = self.engine.scheduler.batch
        assert batch is not None
        turns, batch.turns = batch.turns, ()
        try:
            yield
        finally:
            batch.turns = turns

    def forget_shorter(self) -> None:
        """Forget all states but the one that has read most."""
        self.settle()
        for state in sorted(self.states(), key=lambda state: state.note.length)[:-1]:
            self.store.discard("", state.note.digest)

    @torch.no_grad()
    def bare_steps(self, rows: int, seconds: float) -> float:
        """Tokens per second of steps of the engine's own batch with nothing around them; the engine must be idle."""
        self.settle()
        cache = self.store.open(max(self.states(), key=lambda state: state.note.length))
        work = self.engine.scheduler
        batch = work.batch = work.batch or make_batch(self.model, rows, cache)
        for _ in range(rows):
            batch.add(cache)
        tokens, steps = [1] * rows, 0
        for _ in range(3):
            batch.step(tokens).argmax(-1).tolist()
        synchronize(self.model.device)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch.step(tokens).argmax(-1).tolist()
            steps += 1
        took = time.perf_counter() - start
        batch.empty()
        return rows * steps / took

    def memory(self) -> dict[str, int]:
        """Bytes on the GPU: of tensors, taken by torch, and in use by everything; nothing on a CPU."""
        device = self.model.device
        if device.type != "cuda":
            return {}
        free, whole = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_reserved(device)
        return {"tensors": torch.cuda.memory_allocated(device), "reserved": taken, "in_use": whole - free}


def _drop(path: Path | None) -> None:
    """Let the system forget what it has of a file in memory."""
    if path is not None:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)

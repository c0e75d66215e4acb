"""Rows that join and leave captured steps on a GPU, and an engine over them."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import torch
from engines import alone, ask, engine, prompt, request, whole
from models import adapted
from test_batch import run

from ahn import ops
from ahn.cache.transfer import PIECE, Transfer
from ahn.serve.engine.batch import FixedBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("memory", ["gated_deltanet", "routed_deltanet"])
def test_rows_come_and_go(memory: str) -> None:
    model = adapted(memory=memory, window=40, sinks=4, prefill_chunk_size=64).cuda()
    with ops.use_backend("chunked"):  # nothing is rounded to bfloat16 on the way
        run(model, FixedBatch(model, 3), capacity=3, turns=6)


def test_an_engine_captures_its_steps() -> None:
    model = adapted(window=40, sinks=4).cuda()
    lengths = [1, 5, 20, 25]
    with engine(model, conversations=2) as running:
        assert isinstance(running.scheduler.batch, FixedBatch)
        got = [whole(reply) for reply in [running.submit(request(prompt(n, seed=n), 10)) for n in lengths]]
        # Nothing has left the window yet, so no kernel has rounded anything.
        assert [one.tokens for one in got] == [alone(model, prompt(n, seed=n), 10) for n in lengths]
        ids = [*prompt(25, seed=25), *got[-1].tokens, *prompt(40, seed=1)]
        after = ask(running, ids, 20)
        assert after.cached == 34 and after.finish == "length"
        until = time.monotonic() + 10  # states leave the GPU after the reply is there
        while any(info.where != "memory" for info in running.store.conversations("")) and time.monotonic() < until:
            time.sleep(0.01)
        assert all(info.where == "memory" for info in running.store.conversations(""))


def test_states_stay_on_the_gpu_as_far_as_there_is_room() -> None:
    model = adapted(window=40, sinks=4).cuda()
    with engine(model, conversations=2, device_bytes=1 << 30) as running:
        got = ask(running, prompt(60), 5)
        assert all(info.where == "device" for info in running.store.conversations(""))
        assert ask(running, [*prompt(60), *got.tokens, 7], 5).cached == 64


def test_tensors_come_from_memory_and_from_a_file(tmp_path: Path) -> None:
    shapes = [(0,), (3, 5), (PIECE // 2 - 1,), (PIECE // 2 + 1,), (7, PIECE // 4)]
    there = [torch.randn(shape).bfloat16() for shape in shapes]
    contents = [x.reshape(-1).view(torch.uint8).numpy().tobytes() for x in there]
    (tmp_path / "file").write_bytes(b"".join(contents))
    with Transfer(torch.device("cuda")) as transfer:
        copies, read, place = [transfer.copy(x) for x in there], [], 0
        for x in there:
            read.append(transfer.read(tmp_path / "file", place, tuple(x.shape), x.dtype))
            place += x.nbytes
    (tmp_path / "other").touch()
    with Transfer(torch.device("cuda")) as transfer:
        place = 0
        for x in copies:
            transfer.write(tmp_path / "other", place, x)
            place += x.nbytes
    assert (tmp_path / "other").read_bytes() == (tmp_path / "file").read_bytes()
    assert all(torch.equal(copy.cpu(), x) for copy, x in zip(copies, there, strict=True))
    assert all(torch.equal(own.cpu(), x) for (own, _), x in zip(read, there, strict=True))
    assert [digest.result() for _, digest in read] == [hashlib.sha256(content).digest() for content in contents]


def test_states_come_back_from_disk(tmp_path: Path) -> None:
    model = adapted(window=40, sinks=4).cuda()
    with engine(model, conversations=2, state_dir=tmp_path, state_bytes=1) as running:
        first = ask(running, prompt(30), 5)
        ask(running, prompt(30, seed=1), 5)
        until = time.monotonic() + 10
        while running.stats().on_disk < 2 and time.monotonic() < until:
            time.sleep(0.01)
        ids = [*prompt(30), *first.tokens, 7]
        after = ask(running, ids, 4)
        assert after.cached == 34 and after.tokens == alone(model, ids, 4)

"""Rows that join and leave captured steps on a GPU, and an engine over them."""

from __future__ import annotations

import time

import pytest
import torch
from engines import alone, ask, engine, prompt, request, whole
from models import adapted
from test_batch import run

from ahn import ops
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
        while any(info.where != "memory" for info in running.conversations("")) and time.monotonic() < until:
            time.sleep(0.01)
        assert all(info.where == "memory" for info in running.conversations(""))


def test_states_stay_on_the_gpu_as_far_as_there_is_room() -> None:
    model = adapted(window=40, sinks=4).cuda()
    with engine(model, conversations=2, device_bytes=1 << 30) as running:
        got = ask(running, prompt(60), 5)
        assert all(info.where == "device" for info in running.conversations(""))
        assert ask(running, [*prompt(60), *got.tokens, 7], 5).cached == 64

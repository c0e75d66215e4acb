"""What goes wrong with one request is that one's alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Letters, alone, ask, engine, model, prompt, request, whole
from torch import Tensor
from transformers import PreTrainedModel

from ahn.serve.engine.batch import Batch
from ahn.serve.engine.engine import Engine, EngineBusy
from ahn.serve.engine.scheduler import Scheduler

OF = model()
POISON = 60
"""A token that spoils the forward that reads it."""


class Spoiled:
    """A model's forward with something done to it."""

    def __init__(self, of: PreTrainedModel, change: Callable[[Tensor, Any], Any]) -> None:
        self.of, self.change, self.calls = of, change, 0

    def __enter__(self) -> Spoiled:
        self.handle = self.of.register_forward_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self.calls += 1
        return self.change(kwargs["input_ids"], output)


def prompts(count: int) -> list[list[int]]:
    return [[token for token in prompt(25, seed=n) if token != POISON] for n in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers(temperature: float) -> None:
    def spoil(ids: Tensor, output: Any) -> Any:
        output.logits[(ids == POISON).any(1)] = torch.nan
        return output

    good = prompts(3)
    with engine(OF) as running, Spoiled(OF, spoil):
        bad = [*prompts(1)[0], *prompt(40, seed=9), POISON]
        replies = [running.submit(request(ids, 6)) for ids in good]
        failed = [running.submit(request(bad, 6, temperature=temperature)) for _ in range(2)]
        assert [whole(reply).tokens for reply in replies] == [alone(OF, ids, 6) for ids in good]
        for reply in failed:
            got = whole(reply)
            assert got.finish == "error" and "not numbers" in (got.error or "") and got.tokens == []
        assert ask(running, bad, 6, prompt_logprobs=0).finish == "error"
    assert not any(info.tokens > 40 for info in running.store.conversations(""))  # nothing of it is kept


def test_a_chunk_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    def spoil(ids: Tensor, output: Any) -> Any:
        if ids.shape[1] > 1 and bool((ids == POISON).any()):
            raise RuntimeError("a kernel's fault")
        return output

    good = prompts(2)
    with engine(OF) as running, Spoiled(OF, spoil):
        replies = [running.submit(request(ids, 6)) for ids in (good[0], [POISON, *good[0]], good[1])]
        first, failed, second = (whole(reply) for reply in replies)
    assert [first.tokens, second.tokens] == [alone(OF, ids, 6) for ids in good]
    assert failed.finish == "error" and failed.error == "The model failed on this request (RuntimeError)."
    assert "a kernel's fault" in caplog.text


def test_a_step_that_fails_begins_again() -> None:
    steps = 0

    def spoil(ids: Tensor, output: Any) -> Any:
        nonlocal steps
        steps += ids.shape[1] == 1
        if steps == 7:
            steps += 1
            raise RuntimeError("once")
        return output

    with engine(OF) as running, Spoiled(OF, spoil):
        got = [whole(reply) for reply in [running.submit(request(ids, 9, seed=1)) for ids in prompts(3)]]
    assert steps > 8
    assert [one.tokens for one in got] == [alone(OF, ids, 9) for ids in prompts(3)]


def test_a_step_that_always_fails_ends() -> None:
    def spoil(ids: Tensor, output: Any) -> Any:
        if ids.shape[1] == 1:
            raise RuntimeError("always")
        return output

    with engine(OF) as running:
        with Spoiled(OF, spoil):
            got = [whole(reply) for reply in [running.submit(request(ids, 9)) for ids in prompts(3)]]
        assert {one.finish for one in got} == {"error"}
        assert ask(running, prompts(1)[0], 3).tokens == alone(OF, prompts(1)[0], 3)


@pytest.mark.parametrize("place", [0, -3])
def test_memory_that_runs_out_waits_for_others(place: int) -> None:
    """What was noted of the prompt until then is noted anew, and not once more."""
    failures = 0

    def spoil(ids: Tensor, output: Any) -> Any:
        nonlocal failures
        if failures < 2 and bool((ids == POISON).any()):
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    hungry = list(prompts(1)[0])
    hungry[place] = POISON
    with engine(OF) as running, Spoiled(OF, spoil):
        other = running.submit(request(prompts(1)[0], 60))
        got = ask(running, hungry, 5, prompt_logprobs=1)
        assert whole(other).finish == "length"
    assert [one.token for one in got.prompt_logprobs] == hungry
    assert failures == 2 and got.tokens == alone(OF, hungry, 5)


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes."),
    ],
    ids=["gpu", "cpu"],
)
def test_memory_that_is_never_enough_is_an_error(full: Exception) -> None:
    def spoil(ids: Tensor, output: Any) -> Any:
        raise full

    with engine(OF) as running, Spoiled(OF, spoil):
        got = ask(running, prompts(1)[0], 5)
    assert got.finish == "error" and got.error == "The server has not enough memory for this request."


@pytest.mark.parametrize("place", ["add", "take"])
def test_memory_that_runs_out_where_rows_come_and_go(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    right, failures = getattr(Batch, place), 0

    def full(self: Batch, *rest: Any) -> Any:
        nonlocal failures
        if len(self) > 1 and failures < 2:
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, *rest)

    monkeypatch.setattr(Batch, place, full)
    with engine(OF) as running:
        got = [whole(reply) for reply in [running.submit(request(ids, 20)) for ids in prompts(4)]]
    assert failures and [one.tokens for one in got] == [alone(OF, ids, 20) for ids in prompts(4)]


def test_a_conversation_for_which_a_gpu_has_no_room_is_kept_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    right, failures = Batch.take, 0

    def full(self: Batch, *rest: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, *rest)

    monkeypatch.setattr(Batch, "take", full)
    with engine(OF) as running:
        got = ask(running, prompts(1)[0], 20)
        assert ask(running, [*prompts(1)[0], *got.tokens, 7], 4).cached == len(prompts(1)[0]) + 19


def test_a_processor_that_fails() -> None:
    def fails(ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("no such rule")

    with engine(OF) as running:
        good = running.submit(request(prompts(1)[0], 6))
        bad = ask(running, prompts(2)[1], 6, processors=(fails,))
        assert bad.finish == "error" and "no such rule" in (bad.error or "")
        assert whole(good).tokens == alone(OF, prompts(1)[0], 6)


def test_a_thread_that_fails_for_good_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Scheduler) -> None:
        raise RuntimeError("a fault of ours")

    running = Engine(OF, Letters())  # type: ignore[arg-type]
    reply = running.submit(request(prompts(1)[0], 6))
    monkeypatch.setattr(Scheduler, "turn", broken)
    with caplog.at_level(logging.ERROR):
        running.start()
        assert whole(reply).finish == "error"
    until = time.monotonic() + 5
    while running.alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert not running.alive()
    with pytest.raises(EngineBusy):
        running.submit(request(prompts(1)[0], 6))
    running.close()


def test_a_state_that_vanishes_is_read_anew(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path, state_bytes=1) as running:
        ask(running, prompt(60), 4, keep=True)
        ask(running, prompt(60, seed=1), 4, keep=True)
        monkey = running.store.files
        assert monkey is not None
        for file in tmp_path.glob("states-*/*.safetensors"):
            file.write_bytes(b"")  # the folder's time is the same
        got = ask(running, prompt(60), 4)
        assert got.tokens == alone(OF, prompt(60), 4)

"""The engine: many at once write what each writes alone, and say how they get on."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from engines import SINKS, VOCABULARY, WINDOW, Letters, alone, ask, engine, model, prompt, request, text, whole
from models import EVERYTHING, adapted
from transformers import PreTrainedModel

import ahn
from ahn import AHNError
from ahn.serve.engine.batch import FixedBatch
from ahn.serve.engine.engine import Engine, EngineBusy
from ahn.serve.engine.reply import Reply
from ahn.serve.engine.scheduler import Scheduler
from ahn.serve.request import Delta

OFTEN, SLOW = ("gated_deltanet", "retained"), pytest.mark.slow
LENGTHS = [1, 2, 5, 11, 12, 30, 45]


def test_one_reply() -> None:
    of = model()
    with engine(of) as running:
        got = ask(running, prompt(30), 12)
    assert got.tokens == alone(of, prompt(30), 12)
    assert got.text == text(got.tokens) and got.finish == "length" and got.error is None
    reads = [delta.read for delta in got.deltas]
    assert reads == sorted(reads) and reads[-1] == 30


@pytest.mark.parametrize("memory", [name if name in OFTEN else pytest.param(name, marks=SLOW) for name in EVERYTHING])
def test_many_at_once_write_what_each_writes_alone(memory: str) -> None:
    of = model(memory=memory, quantized=6, max_distance=16)
    with engine(of, conversations=3) as running:
        replies = [running.submit(request(prompt(n, seed=n), 5 + n % 7)) for n in LENGTHS]
        got = [whole(reply) for reply in replies]
    for n, one in zip(LENGTHS, got, strict=True):
        assert one.tokens == alone(of, prompt(n, seed=n), 5 + n % 7), n


@pytest.mark.parametrize("architecture", ["gemma3", pytest.param("llama", marks=pytest.mark.slow)])
def test_layers_without_a_memory_go_along(architecture: str) -> None:
    of = adapted(architecture, window=WINDOW, sinks=SINKS)
    with engine(of, conversations=2) as running:
        replies = [running.submit(request(prompt(n, seed=n), 8)) for n in (1, 25, 13)]
        got = [whole(reply).tokens for reply in replies]
    assert got == [alone(of, prompt(n, seed=n), 8) for n in (1, 25, 13)]


def test_rows_in_fixed_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's captured steps run over, without capture."""
    of = model(quantized=6, max_distance=16)
    monkeypatch.setattr("ahn.serve.engine.scheduler.make_batch", lambda of, rows, like: FixedBatch(of, rows))
    with engine(of, conversations=3) as running:
        replies = [running.submit(request(prompt(n, seed=n), 5 + n % 7)) for n in LENGTHS]
        got = [whole(reply).tokens for reply in replies]
    assert got == [alone(of, prompt(n, seed=n), 5 + n % 7) for n in LENGTHS]


def test_a_turn_of_few_tokens_is_read_in_steps_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model(quantized=6, max_distance=16)
    texts = [prompt(60, seed=n) for n in range(2)]
    turns = [[*text, *prompt(n, seed=9 * n)] for n, text in zip((2, 40), texts, strict=True)]
    drawn = {"temperature": 0.9, "seed": 3}
    with engine(of) as in_chunks:
        expected = [ask(in_chunks, turn, 5 + n, **drawn).tokens for n, turn in enumerate(turns)]
    monkeypatch.setattr("ahn.serve.engine.scheduler.make_batch", lambda of, rows, like: FixedBatch(of, rows))
    monkeypatch.setattr("ahn.serve.engine.scheduler.LATER", float("inf"))  # however slow the machine is
    with engine(of, conversations=3) as running:
        for text in texts:
            ask(running, text, 1)
        read: list[int] = []
        forward = running.scheduler.prompts._forward
        monkeypatch.setattr(
            running.scheduler.prompts, "_forward", lambda *given: read.append(given[1]) or forward(*given)
        )
        other = running.submit(request(prompt(20), 200))
        next(delta for delta in other if delta.tokens)
        del read[:]
        replies = [running.submit(request(turn, 5 + n, **drawn)) for n, turn in enumerate(turns)]
        got = [whole(reply) for reply in replies]
        other.cancel()
        monkeypatch.undo()
        later = [ask(running, [*turn, *one.tokens, 5, 6], 4) for turn, one in zip(turns, got, strict=True)]
        assert not read and [one.cached for one in got] == [60, 60]
    assert [one.tokens for one in got] == expected
    for turn, one, two in zip(turns, got, later, strict=True):
        assert two.tokens == alone(of, [*turn, *one.tokens, 5, 6], 4)


def test_text_that_is_made_during_the_next_step() -> None:
    """As on a GPU, which does not wait for it."""
    of = model()
    written = alone(of, prompt(20), 10)
    running = Engine(of, Letters(), conversations=2)  # type: ignore[arg-type]
    running.scheduler._deferring = True
    running.start()
    replies = [running.submit(request(prompt(n), 10)) for n in (20, 7)]
    stopped = ask(running, prompt(20), 10, stop=(text(written[4:6]),))
    cancelled = running.submit(request(prompt(8), 100_000))
    next(delta for delta in cancelled if delta.tokens)
    cancelled.cancel()
    last = whole(cancelled)
    running.close()
    assert [whole(reply).tokens for reply in replies] == [written, alone(of, prompt(7), 10)]
    assert (stopped.text, stopped.finish) == (text(written[:4]), "stop") and last.finish == "cancelled"
    assert last.text == text(last.tokens)


# -- ends --------------------------------------------------------------------------------------------------------------


class Ending(Letters):
    """With an end token."""

    def __init__(self, end: int) -> None:
        self.eos_token_id = end  # type: ignore[assignment]


def ending(of: PreTrainedModel, place: int) -> tuple[Engine, list[int]]:
    """An engine whose reply to prompt(20) ends at that place, and what is written without an end."""
    written = alone(of, prompt(20), 10)
    assert written[place] not in written[:place]
    return Engine(of, Ending(written[place]), conversations=2), written  # type: ignore[arg-type]


def test_the_id_of_padding_is_a_token_like_others() -> None:
    of, ids = model(), [0, 0, *prompt(20), 0, 0]
    assert of.config.pad_token_id == 0
    with engine(of) as running:
        first = ask(running, ids, 6)
        longer = [*ids, *first.tokens, 0, 0]
        second = ask(running, longer, 6)
    assert second.cached >= len(ids)
    assert (first.tokens, second.tokens) == (alone(of, ids, 6), alone(of, longer, 6))


def test_an_end_token_ends_a_reply() -> None:
    running, written = ending(model(), 3)
    running.start()
    got = ask(running, prompt(20), 10)
    assert (got.tokens, got.text, got.finish) == (written[:4], text(written[:3]), "stop")
    got = ask(running, prompt(20), 10, ignore_eos=True)
    assert (got.tokens, got.finish) == (written, "length")
    running.close()


def test_a_stop_text_ends_a_reply() -> None:
    of = model()
    written = alone(of, prompt(20), 10)
    with engine(of) as running:
        got = ask(running, prompt(20), 10, stop=(text(written[4:6]),))
    assert (got.tokens, got.text, got.finish) == (written[:6], text(written[:4]), "stop")


def test_no_tokens_at_all() -> None:
    with engine() as running:
        got = ask(running, prompt(40), 0)
        assert (got.tokens, got.text, got.finish) == ([], "", "length")
        assert ask(running, prompt(40), 1).cached == 39
        assert ask(running, prompt(1), 0).finish == "length"


def test_cancel_frees_the_row() -> None:
    of = model()
    with engine(of, conversations=1) as running:
        first = running.submit(request(prompt(20), 100_000))
        next(iter(first))
        waiting, gone = running.submit(request(prompt(30), 3)), running.submit(request(prompt(31), 3))
        gone.cancel()
        assert whole(gone).finish == "cancelled"
        first.cancel()
        assert whole(first).finish == "cancelled"
        assert whole(waiting).tokens == alone(of, prompt(30), 3)
        reading = running.submit(request(prompt(4000), 3))
        next(iter(reading))
        reading.cancel()
        assert whole(reading).finish == "cancelled"


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_whoever_is_beside() -> None:
    with engine() as running:
        wanted = ask(running, prompt(20), 12, temperature=1.5, seed=5).tokens
        others = [running.submit(request(prompt(n), 20, temperature=2.0)) for n in (5, 30)]
        assert ask(running, prompt(20), 12, temperature=1.5, seed=5).tokens == wanted
        assert ask(running, prompt(20), 12, temperature=1.5, seed=6).tokens != wanted
        for reply in others:
            whole(reply)


def test_options_are_each_row_s_own() -> None:
    of = model()
    written = alone(of, prompt(20), 5)
    with engine(of) as running:
        plain = running.submit(request(prompt(20), 5))
        biased = running.submit(request(prompt(20), 5, logit_bias={7: 1000.0}))
        assert whole(biased).tokens == [7] * 5 and whole(plain).tokens == written


def test_log_probabilities() -> None:
    of, ids = model(), prompt(40)
    with engine(of) as running:
        got = ask(running, ids, 3, logprobs=2, prompt_logprobs=3)
        again = ask(running, ids, 1, prompt_logprobs=0)
        short = ask(running, ids[:1], 1, prompt_logprobs=1)
    with torch.no_grad():
        logprobs = of(torch.tensor([ids + got.tokens])).logits[0].log_softmax(-1)
    both = got.prompt_logprobs + got.logprobs
    assert [one.token for one in both] == ids + got.tokens and both[0].logprob is None
    for place, one in enumerate(both[1:]):
        assert one.logprob == pytest.approx(float(logprobs[place, one.token]), abs=1e-4)
        count = 3 if place < len(ids) - 1 else 2
        assert [token for token, _ in one.top] == logprobs[place].topk(count).indices.tolist()
    assert again.cached == 0 and len(again.prompt_logprobs) == 40 and again.prompt_logprobs[5].top == ()
    assert [one.logprob for one in short.prompt_logprobs] == [None]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        ([1, VOCABULARY], {}, "Token ids"),
        ([-1], {}, "Token ids"),
        ([1], {"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
    ],
)
def test_bad_requests(ids: Any, options: dict[str, Any], said: str) -> None:
    running = Engine(_SHARED, Letters())  # type: ignore[arg-type]
    with pytest.raises(AHNError, match=said):
        running.submit(request(ids, **options))


_SHARED = model()


def test_a_full_queue_is_busy() -> None:
    running = Engine(_SHARED, Letters(), conversations=3, queue=2)  # type: ignore[arg-type]
    replies = [running.submit(request(prompt(5), 2)) for _ in range(5)]  # the engine does not work yet
    with pytest.raises(EngineBusy, match="2 requests are waiting") as busy:
        running.submit(request(prompt(5), 2))
    assert busy.value.retry_after >= 1
    replies.pop().cancel()
    replies.append(running.submit(request(prompt(5), 2)))  # nobody waits for the one that was cancelled
    running.start()
    assert [whole(reply).finish for reply in replies] == ["length"] * 5
    assert running.submit(request(prompt(5), 2)) is not None
    running.close()
    assert not running.alive()
    with pytest.raises(EngineBusy):
        running.submit(request(prompt(5), 2))


def test_closing_finishes_or_cancels() -> None:
    running = Engine(_SHARED, Letters(), conversations=1)  # type: ignore[arg-type]
    running.start()
    short, endless = running.submit(request(prompt(5), 5)), running.submit(request(prompt(5), 1_000_000))
    running.close(timeout=0.5)
    assert whole(short).finish == "length" and whole(endless).finish == "cancelled"


# -- others and their threads ------------------------------------------------------------------------------------------


def test_other_threads_use_of_the_model_changes_nothing() -> None:
    of = model()
    wanted, stop = alone(of, prompt(30), 12), threading.Event()

    def others() -> None:
        while not stop.is_set():
            with ahn.disabled(of), torch.no_grad():
                of(torch.tensor([prompt(25, seed=3)]))
            alone(of, prompt(20, seed=4), 3)

    thread = threading.Thread(target=others)
    with engine(of) as running:
        thread.start()
        with ahn.disabled(of):  # of this thread, not of the engine's
            assert [ask(running, prompt(30), 12, keep=False).tokens for _ in range(2)] == [wanted] * 2
        stop.set()
        thread.join()


def test_a_changed_window_is_for_new_engines() -> None:
    of = model()
    wanted = alone(of, prompt(40), 5)
    with engine(of) as running:
        ahn.set_window(of, 20, 2)
        assert ask(running, prompt(40), 5).tokens == wanted


# -- replies -----------------------------------------------------------------------------------------------------------


def test_a_reply_in_an_event_loop() -> None:
    of = model()

    async def both(running: Engine) -> list[list[int]]:
        async def one(n: int) -> list[int]:
            return [token async for delta in running.submit(request(prompt(n), 6)) for token in delta.tokens]

        return list(await asyncio.gather(one(10), one(30)))

    with engine(of) as running:
        assert asyncio.run(both(running)) == [alone(of, prompt(n), 6) for n in (10, 30)]


def test_progress_that_nobody_read_is_merged() -> None:
    reply = Reply()
    for read in range(100):
        reply.put(Delta(read=read))
    reply.put(Delta(tokens=(1,)))
    reply.put(Delta(finish="length"))
    assert [delta.read for delta in reply] == [99, 0, 0]


def test_the_engine_does_not_wait_for_readers() -> None:
    with engine(conversations=2) as running:
        slow = running.submit(request(prompt(5), 40))
        assert ask(running, prompt(7), 5).finish == "length"
        time.sleep(0.1)
        assert len(whole(slow).tokens) == 40


def test_an_engine_that_has_no_room_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Scheduler) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Scheduler, "warm_up", full)
    running = Engine(_SHARED, Letters(), conversations=3)  # type: ignore[arg-type]
    with pytest.raises(AHNError, match="3 conversations"):
        running.start()
    assert not running.alive()
    running.close()


def test_statistics() -> None:
    with engine() as running:
        ask(running, prompt(50), 4)
        ask(running, prompt(50), 4)
        stats = running.stats()
        assert stats.tokens_read == 49 and stats.tokens_cached == 49 and stats.tokens_written == 8
        assert stats.waiting == 0 and stats.in_memory == 2 and stats.on_disk == 0 and stats.bytes_in_memory > 0

"""Captured steps of several tokens are ordinary forwards: guesses that are taken out again, and short turns.

As elsewhere here, a replay runs the step itself, over the buffers that a GPU has.
"""

from __future__ import annotations

import copy
import gc
import random
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import LOSSLESS, SINKS, TOLERANCE, WINDOW, Graphs, shared
from engines import alone, ask, engine, prompt, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import RULED, adapted, awaken, base, tokens
from support.effort import examples
from support.turns import assert_same_layers
from support.work import Work
from talk import Talk
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache
from ahn.cache import rows
from ahn.decode import runner, several
from ahn.serve.engine.batch import FixedBatch

MEMORIES = (*RULED, "window_only")
PLACES = 8
"""Of a window of 9."""


def _guessing(model: PreTrainedModel, first: int = LOSSLESS + 3, seed: int = 0) -> Talk:
    talk = Talk(model, 1, seed=seed)
    talk.read([first])
    talk.cache.activate_past_recording()
    return talk


def stop_recording(talk: Talk) -> None:
    for layer in talk.cache.layers:
        layer.record_past = False


def _turning(model: PreTrainedModel, first: int = LOSSLESS + 3) -> Talk:
    """A conversation whose short turns are captured."""
    talk = Talk(model, 1)
    talk.read([first])
    assert several.prepare(model, talk.cache)
    return talk


def assert_whole(talk: Talk) -> None:
    """Logits, keys, gates and state are those of one forward."""
    talk.check(TOLERANCE)
    whole = AHNCache.for_model(talk.model)
    with torch.no_grad():
        talk.model(torch.tensor(talk.rows), past_key_values=whole)
    assert_same_layers(talk.cache, whole)


@pytest.mark.sample(2)
@pytest.mark.parametrize("first", [2, LOSSLESS - 3, LOSSLESS, 40])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "phi3", "qwen3 without router and q_proj"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_guesses_are_read_and_taken_out(memory: str, architecture: str, first: int, graphs: Graphs) -> None:
    """From before the window is full until it has gone round."""
    name, *without = architecture.split(maxsplit=1)
    draw, talk = random.Random(memory), _guessing(shared(name, memory, options=not without), first)
    for _ in range(25):
        count = draw.randint(1, PLACES)
        talk.read([count])
        talk.crop(draw.randint(0, count))
    assert graphs.captures == 2, "one that reads and one that settles"
    assert graphs.replays > 25
    stop_recording(talk)
    talk.steps(2)
    assert_whole(talk)


@pytest.mark.sample(2)
@pytest.mark.parametrize("first", [2, LOSSLESS - 3, 40])
@pytest.mark.parametrize("memory", MEMORIES)
def test_turns_in_pieces_are_the_whole_forward(memory: str, first: int, graphs: Graphs) -> None:
    draw, talk = random.Random(first), _turning(shared(memory=memory, options=True), first)
    for count in (PLACES, *(draw.randint(2, PLACES) for _ in range(8))):
        talk.read([count])
        assert talk.cache.progress.waiting == talk.cache.progress.beside == 0
    assert graphs == Graphs(captures=2, replays=18)
    talk.steps(3)
    assert graphs == Graphs(captures=3, replays=21)
    talk.read([3])
    talk.read([20])
    talk.read([3])
    assert_whole(talk)


@pytest.mark.sample(1)
@pytest.mark.parametrize("memory", MEMORIES)
def test_layers_share_compiled_code(memory: str, compiled: list[torch.fx.Graph]) -> None:
    talk = _turning(shared(memory=memory))
    for count in (PLACES, 3, 5):
        talk.read([count])
    steps = [node for graph in compiled for node in graph.nodes if node.target is torch.ops.ahn.several.default]
    assert len(steps) == 1, "of one layer for all"
    assert ("cos" in steps[0].kwargs) == (memory != "routed_deltanet"), "what the scan of many tokens reads is rotated"
    talk.check(TOLERANCE)


def test_greedy_text_with_guesses_is_the_one_without(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `generate`, with a lookup that guesses right and wrong."""
    model = adapted(window=32, sinks=SINKS, prefill_chunk_size=16)
    ids = tokens(1, 6).repeat(1, 9)[:, :51]
    options = {"max_new_tokens": 40, "do_sample": False}
    cache = AHNCache.for_model(model)
    found = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert graphs.captures == 2 and cache.several is not None
    assert torch.equal(found, model.generate(ids, **options))
    monkeypatch.setattr(runner, "on_gpu", lambda ids: False)
    assert torch.equal(found, model.generate(ids, **options))


def _forked(talk: Talk) -> None:
    original, talk.cache = talk.cache, copy.deepcopy(talk.cache)
    with torch.no_grad():
        talk.model(tokens(1, 3), past_key_values=original)


def _saved(talk: Talk) -> None:
    with tempfile.TemporaryDirectory() as folder:
        talk.cache.save(Path(folder) / "cache")
        talk.cache = AHNCache.load(Path(folder) / "cache", talk.model)
        talk.cache.activate_past_recording()


def _one_of_two(talk: Talk) -> None:
    talk.cache.batch_repeat_interleave(2)
    talk.cache.batch_select_indices(torch.tensor([1]))


def _plain_step(talk: Talk) -> None:
    stop_recording(talk)
    talk.steps(1)
    talk.cache.activate_past_recording()


def _ordinary_step(talk: Talk) -> None:
    stop_recording(talk)
    talk.read([1], output_hidden_states=True)
    talk.cache.activate_past_recording()


EVENTS: dict[str, Callable[[Talk], object]] = {
    "fork": _forked,
    "save and load": _saved,
    "copy a row": _one_of_two,
    "steps without guesses": _plain_step,
    "an ordinary step": _ordinary_step,
    "an ordinary forward": lambda talk: talk.read([4], output_hidden_states=True),
    "a long turn": lambda talk: talk.read([70]),
    "more than there is place for": lambda talk: [talk.read([6]) for _ in range(3)],
    "move": lambda talk: talk.cache.to("cpu"),
    "weigh": lambda talk: talk.cache.nbytes(),
    "inference mode": lambda talk: _in_inference_mode(talk),
    "crop beyond what waits beside slots": lambda talk: talk.crop(min(talk.cache.progress.waiting, 7)),
}


def _in_inference_mode(talk: Talk) -> None:
    with torch.inference_mode():
        talk.read([2])


@pytest.mark.sample(4)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("first", [3, LOSSLESS - 2, 40])
def test_after_any_event_guesses_go_on(event: str, first: int) -> None:
    talk = _guessing(shared(options=True), first)
    for kept in (5, 2, 0, 6):
        talk.read([6])
        talk.crop(6 - kept)
        EVENTS[event](talk)
    talk.read([5])
    talk.crop(2)
    stop_recording(talk)
    talk.steps(2)
    assert_whole(talk)


@pytest.mark.parametrize("memory", ["gated_deltanet", "window_only"])
@given(
    first=st.integers(1, 2 * LOSSLESS),
    events=st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=6),
    draw=st.randoms(use_true_random=False),
)
@settings(max_examples=examples(2, 30), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_course_of_guesses(memory: str, first: int, events: list[str], draw: random.Random) -> None:
    talk = _guessing(shared(memory=memory), first)
    for event in events:
        count = draw.randint(1, PLACES)
        talk.read([count])
        talk.crop(draw.randint(0, count))
        EVENTS[event](talk)
    stop_recording(talk)
    talk.read([draw.randint(1, 9)])
    assert_whole(talk)


def test_sinks_that_move_along(graphs: Graphs) -> None:
    """Tokens on both sides of the place from which they are seen elsewhere are read in two steps."""
    talk = _guessing(adapted(window=16, sinks=SINKS, max_distance=64, prefill_chunk_size=8), 58)
    for _ in range(20):
        talk.read([5])
        talk.crop(2)
    assert graphs.captures == 2 and graphs.replays > 24, "some settle, and some steps are two"
    with torch.no_grad():
        expected = talk.model(torch.tensor(talk.rows), past_key_values=AHNCache.for_model(talk.model)).logits[0]
    torch.testing.assert_close(torch.cat(talk._logits[0]), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_row_of_its_own_for_turns(graphs: Graphs) -> None:
    """What is read so can join a batch."""
    model = shared()
    talk = _turning(model)
    talk.read([6])
    other = Talk(model, 1, seed=1)
    other.read([9])
    pair = rows.join([talk.cache, other.cache])
    assert rows.lengths(pair) == [LOSSLESS + 9, 9]
    guess = _guessing(model, 3)
    guess.read([4])
    stop_recording(guess)
    assert guess.cache.progress.waiting == 0 and guess.cache.progress.beside == 4
    pair = rows.join([guess.cache, other.cache])
    with torch.no_grad():
        ids = tokens(2, 1)
        found = model(ids, past_key_values=pair, position_ids=torch.tensor([[7], [9]])).logits[0]
        alone = model(torch.cat([torch.tensor(guess.rows), ids[:1]], dim=1), use_cache=False).logits[0, -1:]
    torch.testing.assert_close(found, alone, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_graph_keeps_no_buffers_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "capture", lambda model, once: (lambda: None, once()))
    talk = _turning(shared())
    talk.read([4])
    state = talk.cache.memory_layers[0].state
    assert state is not None and state.beside is not None
    held = weakref.ref(state.window.keys), weakref.ref(state.beside.keys)
    steps = weakref.ref(talk.cache.several)
    del state
    talk.cache.reset()
    assert [x() for x in held] == [None, None] and steps() is not None
    del talk
    gc.collect()
    assert steps() is None


def test_two_threads_guess_with_one_model() -> None:
    talks = [_guessing(shared(), 20 + n, seed=n) for n in range(2)]

    def go_on(talk: Talk) -> None:
        for _ in range(10):
            talk.read([5])
            talk.crop(3)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(go_on, talks))
    for talk in talks:
        talk.check(TOLERANCE)


@pytest.mark.parametrize(
    "why", ["two rows", "tier", "retained", "several devices", "padding", "observer", "narrow window"]
)
def test_what_no_graph_can_do(why: str, graphs: Graphs) -> None:
    options: dict[str, Any] = {"window": WINDOW, "sinks": SINKS}
    options |= {"tier": {"quantized": 4}, "retained": {"memory": why}, "narrow window": {"window": 7}}.get(why, {})
    model = adapted(**options)
    if why == "tier":
        model = model.double()
    if why == "several devices":
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    talk = Talk(model, 2 if why == "two rows" else 1)
    talk.read([20] * len(talk.rows))
    talk.cache.activate_past_recording()
    if why == "observer":
        with ahn.inspect.record(model), pytest.raises(ahn.AHNError, match="cannot look on"):
            talk.read([3])
        return
    if why == "padding":
        mask = torch.ones(1, 23, dtype=torch.long)
        mask[0, 20] = 0
        with pytest.raises(ahn.AHNError, match="only in a batch without padding"), torch.no_grad():
            model(tokens(1, 3), attention_mask=mask, past_key_values=talk.cache)
        return
    for _ in range(3):
        talk.read([3] * len(talk.rows))
        talk.crop(1)
    assert graphs == Graphs()
    talk.check(TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("memory", ["gated_deltanet", "window_only"])
def test_a_turn_is_read_as_a_conversation_joins_a_batch(memory: str, graphs: Graphs) -> None:
    """From whatever length, beside others, also over the place where sinks move; graphs are recorded once."""
    model = adapted(memory=memory, window=32, sinks=SINKS, max_distance=64, prefill_chunk_size=16)
    batch = FixedBatch(model, 4, turns=True)
    for n, (first, turn) in enumerate([(3, 9), (34, 40), (58, 17), (90, 16)]):
        ids = tokens(1, first + turn + 1, seed=n)
        cache = AHNCache.for_model(model)
        model(ids[:, :first], past_key_values=cache)
        read, after_turn = batch.read_turn(cache, ids[0, first:-1].tolist())
        assert cache.seen == first, "what is kept stays as it is"
        batch.add(read)
        after_step = batch.step([5] * n + ids[0, -1:].tolist())[-1:]
        expected = model(ids, past_key_values=AHNCache.for_model(model)).logits[0, -2:]
        torch.testing.assert_close(torch.cat([after_turn, after_step]), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert batch._room is not None and len(batch._room.several.graphs) == 1, "places for 32 tokens, so steps of 16"
    assert graphs.captures == 2 + 3, "of the turns, and of 1, 2 and 4 rows"


@torch.no_grad()
def test_a_turn_costs_a_host_few_calls_whatever_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its captured steps, also where sinks move: a first token waits for all of them."""
    monkeypatch.setattr(runner, "capture", lambda model, once: (lambda: None, once()))
    config = ahn.AHNConfig(memory="gated_deltanet", window=32, sinks=2, max_distance=48, prefill_chunk_size=16)

    def calls(layers: int) -> dict[str, Counter[str]]:
        model = awaken(ahn.attach(base(num_hidden_layers=layers), config))
        kept, batch, found = AHNCache.for_model(model), FixedBatch(model, 2, turns=True), dict[str, Counter[str]]()
        model(tokens(1, 90), past_key_values=kept)
        batch.prepare(kept)
        with Work() as work:
            read, _ = batch.read_turn(kept, [3] * 9)
        assert read.progress.anchor != kept.progress.anchor
        found["turn"] = work.calls
        parts = {"join": lambda: batch.add(read), "step": lambda: batch.step([5]), "leave": lambda: batch.drop(0)}
        for name, part in parts.items():
            with Work() as work:
                part()
            found[name] = work.calls
        return found

    few, more = calls(layers=1), calls(layers=3)
    a_layer = {name: (more[name].total() - few[name].total()) / 2 for name in few}
    assert a_layer == {"turn": 4, "join": 0, "step": 0, "leave": 0}, "keys, values and two gates are laid out in slots"
    assert few["turn"].total() < 100 and few["join"].total() < 10 and few["step"].total() < 15
    waits = {"aten::nonzero", "aten::lift_fresh"} & set(few["turn"])
    assert not waits and few["turn"]["aten::_local_scalar_dense"] == 1, "how long it is, which the CPU knows"


def test_an_engine_reads_turns_so(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn's own step gives the first token, alone and beside others, also where it is the last one."""
    of, drawing = adapted(window=16, sinks=2, prefill_chunk_size=16), {"temperature": 0.9, "seed": 3}
    text, said = prompt(60, seed=1), prompt(11, seed=2)
    with engine(of) as in_chunks:
        expected = ask(in_chunks, [*text, *said], 2, **drawing).tokens
    monkeypatch.setattr(
        "ahn.serve.engine.scheduler.make_batch", lambda of, rows, like: FixedBatch(of, rows, turns=True)
    )
    with engine(of, conversations=2) as running:
        ask(running, text, 1)
        batch, steps = running.scheduler.batch, list[int]()
        assert isinstance(batch, FixedBatch)
        step = batch.step
        monkeypatch.setattr(batch, "step", lambda ids: steps.append(len(ids)) or step(ids))
        ended = ask(running, [*text, *said], 1, **drawing)
        assert ended.tokens == expected[:1] and not steps
        assert ask(running, [*text, *said], 2, **drawing).tokens == expected and steps == [1]
        later = ask(running, [*text, *said, *expected, 7], 5)
        other = running.submit(request(prompt(20), 60))
        next(delta for delta in other if delta.tokens)
        one = ask(running, [*text, *said], 5)
        other.cancel()
        assert ended.cached == 60 and one.cached >= 60 and batch._room is not None
    assert one.tokens == alone(of, [*text, *said], 5)
    assert later.tokens == alone(of, [*text, *said, *expected, 7], 5)

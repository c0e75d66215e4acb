"""Captured decoding steps are ordinary forwards, whatever else happens to the conversation in between.

A CPU has no graphs: here each replay runs the step itself. The buffers, and who may use them when, are as on a GPU.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captured import CAPTURED, EVENTS, LOSSLESS, SINKS, TOLERANCE, WINDOW, Graphs, converse, shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import adapted, awaken, base, tokens
from support.effort import examples
from support.sighted import prompt, seeing
from support.turns import assert_same_layers
from talk import Talk
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache, AHNError
from ahn.decode import runner

# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "phi3", "qwen3 without router and q_proj"])
@pytest.mark.parametrize("memory", CAPTURED)
def test_steps_are_the_whole_forward(architecture: str, memory: str, graphs: Graphs) -> None:
    """From before the window is full until it has gone round; keys, gates and state as well as logits."""
    name, *without = architecture.split(maxsplit=1)
    model = shared(name, memory, options=not without)
    talk = Talk(model, 2)
    talk.read([5, 5])
    talk.steps(20)
    talk.check(TOLERANCE)
    assert graphs == Graphs(captures=1, replays=20)
    whole = AHNCache.for_model(model)
    with torch.no_grad():
        model(torch.tensor(talk.rows), past_key_values=whole)
    assert_same_layers(talk.cache, whole)


@pytest.mark.sample(4)
@pytest.mark.parametrize("memory", CAPTURED)
@pytest.mark.parametrize("length", [LOSSLESS - 1, LOSSLESS, LOSSLESS + 1, 2 * LOSSLESS])
def test_a_first_step_at_the_boundary(memory: str, length: int, graphs: Graphs) -> None:
    talk = Talk(shared(memory=memory), 1)
    talk.read([length])
    talk.steps(4)
    talk.read([7])
    talk.check(TOLERANCE)
    assert graphs.replays == 4


@pytest.mark.sample(3)
@pytest.mark.parametrize("memory", CAPTURED)
@pytest.mark.parametrize("explicit", [True, False], ids=["positions given", "positions by default"])
def test_rows_with_padding_of_their_own(memory: str, explicit: bool, graphs: Graphs) -> None:
    """Rows meet the boundary at different steps; one starts with no token at all; rows pause while others go on."""
    if memory == "routed_deltanet" and not explicit:
        pytest.skip("it maps rotated keys, so that a row in other positions is another row")
    talk = Talk(shared(memory=memory), 4, explicit=explicit)
    talk.read([LOSSLESS + 2, LOSSLESS - 2, 4, 0])
    talk.steps(5)
    for _ in range(3):
        talk.read([1, 0, 1, 0])
    talk.read([0, 1, 0, 1])
    talk.steps(6)
    assert graphs == Graphs(captures=1, replays=15)
    talk.read([2, 5, 0, 7])  # what was paused is padding now
    talk.read([0, 1, 1, 1])
    talk.steps(3)
    talk.check(TOLERANCE)
    assert graphs == Graphs(captures=2, replays=19)


@pytest.mark.sample(2)
@pytest.mark.parametrize("memory", CAPTURED)
def test_greedy_tokens_are_those_without_graphs(memory: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = shared(memory=memory), tokens(3, 10), torch.ones(3, 10, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    found = model.generate(ids, **options)
    assert graphs == Graphs(captures=1, replays=29)
    monkeypatch.setattr(runner, "on_gpu", lambda ids: False)
    assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.sample(2)
@pytest.mark.parametrize("memory", CAPTURED)
def test_beam_search_reorders_the_buffers_of_one_graph(
    memory: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, mask = shared(memory=memory), tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    options: dict[str, Any] = {
        "attention_mask": mask, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "do_sample": False,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    found = model.generate(ids, **options)
    assert graphs == Graphs(captures=1, replays=19)
    monkeypatch.setattr(runner, "on_gpu", lambda ids: False)
    expected = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=TOLERANCE, atol=0)


# -- what else may happen to a conversation ----------------------------------------------------------------------------


@pytest.mark.sample(4)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("lengths", [(4, 2, 3), (LOSSLESS + 2, LOSSLESS - 1, 5)], ids=str)
def test_after_any_event_steps_go_on(event: str, lengths: tuple[int, ...]) -> None:
    converse(Talk(shared(options=True), len(lengths)), lengths, ["pause", event, event])


@pytest.mark.parametrize("memory", ["gated_deltanet", "window_only"])
@given(
    lengths=st.lists(st.integers(1, 2 * LOSSLESS), min_size=2, max_size=3),
    events=st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=6),
    explicit=st.booleans(),
)
@settings(max_examples=examples(3, 8), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_course_of_a_conversation(memory: str, lengths: list[int], events: list[str], explicit: bool) -> None:
    converse(Talk(shared(memory=memory), len(lengths), explicit=explicit), lengths, events)


def test_conversations_take_turns_on_one_model(graphs: Graphs) -> None:
    talks = [Talk(shared(), batch, seed=i) for i, batch in enumerate((2, 2, 1))]
    for i, talk in enumerate(talks):
        talk.read([6 + 5 * i] * len(talk.rows))
    for _ in range(12):
        for talk in talks:
            talk.steps(1)
    for talk in talks:
        talk.check(TOLERANCE)
    assert graphs == Graphs(captures=3, replays=36)


def test_a_graph_outlives_inference_mode(graphs: Graphs) -> None:
    """What is made in `torch.inference_mode` may not be written outside of it."""
    talk = Talk(shared(), 2)
    with torch.inference_mode():
        talk.read([20, 11])
        talk.steps(2)
    talk.steps(2)
    with torch.inference_mode():
        talk.read([1, 1], output_hidden_states=True)
    talk.steps(2)
    talk.read([1, 1], output_hidden_states=True)
    talk.steps(1)
    talk.check(TOLERANCE)
    assert graphs == Graphs(captures=1, replays=7)


def test_a_cache_after_reset_takes_another_batch(graphs: Graphs) -> None:
    talk = Talk(shared(), 2)
    talk.read([14, 9])
    talk.steps(3)
    other = Talk(shared(), 3, seed=1)
    other.cache = talk.cache
    talk.cache.reset()
    converse(other, [9, 14, 4], ["reorder", "steps"])


def test_a_conversation_keeps_its_window() -> None:
    model = adapted(window=WINDOW, sinks=SINKS)
    talk = Talk(model, 1)
    talk.read([20])
    talk.steps(2)
    ahn.set_window(model, 4, 1)
    talk.steps(12)
    ahn.set_window(model, WINDOW, SINKS)
    talk.check(TOLERANCE)


def test_a_failed_capture_leaves_the_conversation_as_it_was(monkeypatch: pytest.MonkeyPatch, graphs: Graphs) -> None:
    talk = Talk(shared(), 2)
    talk.read([20, 11])

    def fails(model: PreTrainedModel, once: Callable[[], Tensor]) -> None:
        once()
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runner, "capture", fails)
        with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
            talk.model(tokens(2, 1), past_key_values=talk.cache)
        patch.setattr(runner, "on_gpu", lambda ids: False)
        talk.steps(2)
    talk.steps(2)
    talk.check(TOLERANCE)
    assert graphs == Graphs(captures=1, replays=2)


def test_a_graph_keeps_no_buffers_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parked or forgotten conversation frees its window, and its graph as well."""
    monkeypatch.setattr(runner, "capture", lambda model, once: (lambda: None, once()))
    talk = Talk(shared(), 1)
    talk.read([20])
    talk.steps(1)
    window, captured = weakref.ref(talk.cache.memory_layers[0].keys), weakref.ref(talk.cache.captured)
    assert window() is not None
    talk.cache.reset()
    assert window() is None and captured() is not None
    del talk
    gc.collect()
    assert captured() is None


# -- what goes the ordinary way ----------------------------------------------------------------------------------------


def _ready(model: PreTrainedModel | None = None) -> Talk:
    talk = Talk(model or shared(), 2)
    talk.read([20, 13])
    talk.steps(2)
    return talk


@pytest.mark.parametrize(
    ("flag", "by"),
    [("output_hidden_states", "argument"), ("output_hidden_states", "config"), ("output_attentions", "argument")],
)
def test_more_outputs_are_given(flag: str, by: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = _ready(awaken(ahn.attach(base(attn_implementation="eager"), ahn.AHNConfig(window=WINDOW, sinks=SINKS))))
    options = {flag: True}
    if by == "config":
        options = {}
        monkeypatch.setattr(talk.model.config, flag, True)
    out = talk.read([1, 1], **options)
    assert len(getattr(out, flag.removeprefix("output_"))) >= 2
    assert graphs == Graphs(captures=1, replays=2)


@torch.no_grad()
def test_a_tuple_an_embedding_and_a_loss(graphs: Graphs) -> None:
    talk, ids = _ready(), tokens(2, 1)
    mask = torch.cat([talk.mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    found = {}
    for name, options in {
        "step": {"input_ids": ids},
        "tuple": {"input_ids": ids, "return_dict": False},
        "embedding": {"inputs_embeds": talk.model.get_input_embeddings()(ids)},
        "loss": {"input_ids": ids, "labels": ids},
    }.items():
        found[name] = talk.model(past_key_values=copy.deepcopy(talk.cache), attention_mask=mask, **options)
    assert graphs.replays == 3
    assert isinstance(found["tuple"], tuple) and found["loss"].loss is not None
    for logits in (found["tuple"][0], found["embedding"].logits, found["loss"].logits):
        torch.testing.assert_close(logits, found["step"].logits, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "why",
    [
        "gradients",
        "training",
        "no step_rule",
        "ct_max",
        "full attention in a layer",
        "gemma3",
        "dynamic angles",
        "several devices",
    ],
)
def test_what_no_graph_can_do(why: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"window": WINDOW, "sinks": SINKS}
    if why == "ct_max":
        options["memory"] = why
    if why == "full attention in a layer":
        options["full_attention_layers"] = (1,)
    model = adapted("gemma3" if why == "gemma3" else "qwen3", **options)
    if why == "dynamic angles":  # they change with the length of the text
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        model = awaken(
            ahn.attach(base(rope_parameters=rope), model.ahn_config.replace(max_distance=0, keys_before_rope=False))
        )
    if why == "several devices":
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    if why == "no step_rule":
        monkeypatch.setattr(type(model.get_decoder().layers[0].ahn.fn), "step_rule", lambda self: None)
    model.train(why == "training")  # no dropout: the same numbers
    talk = Talk(model, 2)
    talk.read([20, 13])
    if why == "gradients":
        with torch.enable_grad():
            out = model(tokens(2, 1), past_key_values=copy.deepcopy(talk.cache))
        assert out.logits.requires_grad
    else:
        talk.steps(3)
    talk.check(TOLERANCE)
    assert graphs == Graphs()


@torch.no_grad()
def test_positions_of_several_dimensions_take_the_ordinary_way(graphs: Graphs) -> None:
    """As a model that sees images gives them to `generate`; and without any, they follow from images before."""
    model = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=WINDOW, sinks=SINKS)))
    found = model.generate(**prompt(), max_new_tokens=4, do_sample=False)
    logits = model(**prompt(found[:, -4:]), use_cache=False).logits
    assert torch.equal(logits[:, -5:-1].argmax(-1), found[:, -4:]) and graphs == Graphs()


@torch.no_grad()
def test_disabled_is_the_base_model(graphs: Graphs) -> None:
    model, plain, ids = adapted(window=WINDOW, sinks=SINKS), base(), tokens(2, 1)
    talk = _ready(model)
    with ahn.disabled(model):
        full = model(tokens(2, 20)).past_key_values
        expected = plain(ids, past_key_values=plain(tokens(2, 20)).past_key_values).logits
        assert torch.equal(model(ids, past_key_values=full).logits, expected)
        with pytest.raises(AHNError, match=r"Inside ahn\.disabled"):
            model(ids, past_key_values=talk.cache)
    talk.steps(3)
    talk.check(TOLERANCE)
    assert graphs == Graphs(captures=1, replays=5)


@torch.no_grad()
def test_a_graph_is_of_one_adapter_and_one_place(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter, or a model that was moved and came back: the graph would read what is no longer there."""
    model, plain, ids = adapted(window=WINDOW, sinks=SINKS), base(), tokens(2, 5)
    talk = _ready(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    talk.steps(2)
    talk.check(TOLERANCE)
    assert graphs.captures == 2
    ahn.detach(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))
    torch.manual_seed(5)
    awaken(ahn.attach(model, ahn.AHNConfig(window=WINDOW, sinks=SINKS)))
    twin, mask = copy.deepcopy(talk.cache), torch.cat([talk.mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    found = model(ids[:, :1], attention_mask=mask, past_key_values=talk.cache).logits
    assert graphs == Graphs(captures=3, replays=5)
    monkeypatch.setattr(runner, "on_gpu", lambda ids: False)
    expected = model(ids[:, :1], attention_mask=mask, past_key_values=twin).logits
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _wrong_inputs(talk: Talk) -> Iterator[dict[str, Any]]:
    ids, seen = tokens(2, 1), talk.cache.seen
    for shape in ((2, seen), (2, seen + 2), (2, 1), (2, 1, 1, seen + 1)):
        yield {"input_ids": ids, "attention_mask": torch.ones(*shape, dtype=torch.long)}
    yield {"input_ids": ids, "attention_mask": {"full_attention": None}}
    yield {"input_ids": tokens(3, 1)}
    yield {"input_ids": tokens(1, 1), "attention_mask": torch.ones(1, seen + 1, dtype=torch.long)}


@torch.no_grad()
@pytest.mark.parametrize("captured", [False, True], ids=["first step", "later step"])
def test_wrong_inputs_are_refused_as_ever(captured: bool, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(shared(), 2)
    talk.read([20, 13])
    if captured:
        talk.steps(2)
    for inputs in _wrong_inputs(talk):
        with pytest.raises(AHNError) as found:
            talk.model(**inputs, past_key_values=talk.cache)
        with monkeypatch.context() as patch:
            patch.setattr(runner, "on_gpu", lambda ids: False)
            with pytest.raises(AHNError) as expected:
                talk.model(**inputs, past_key_values=talk.cache)
        assert str(found.value) == str(expected.value)
    talk.steps(2)
    talk.check(TOLERANCE)
    assert graphs.captures == 1


@torch.no_grad()
def test_nothing_follows_padding_on_the_right(graphs: Graphs) -> None:
    model = shared()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    conversation = AHNCache.for_model(model)
    model(tokens(2, 20), attention_mask=mask, past_key_values=conversation)
    with pytest.raises(AHNError, match="padding between real tokens"):
        model(tokens(2, 1), past_key_values=conversation)
    assert graphs == Graphs()

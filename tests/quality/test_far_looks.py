"""Looks at far tokens: what they must have in common with the model's own attention, and what they choose."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from models import base, tokens
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import far_looks
from real.looks import Look, Reader

from ahn.memory.retained_tokens import Scorer

WINDOW = 8


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return base("llama")


def reader(model: PreTrainedModel, sinks: int = 0) -> Reader:
    text = model.config
    order = [(n, head) for n in range(text.num_hidden_layers) for head in range(text.num_key_value_heads)]
    torch.manual_seed(0)
    scorers = [Scorer(text.hidden_size, text.num_key_value_heads) for _ in range(text.num_hidden_layers)]
    return Reader(model, WINDOW, sinks, order, scorers)


@torch.no_grad()
@pytest.mark.parametrize("changed", [{}, {"steady": True}, {"top": 1000}, {"choice": "found", "slots": 1000}])
def test_everything_at_its_own_distance_is_the_models_own_attention(
    model: PreTrainedModel, changed: dict[str, object]
) -> None:
    ids, places, ours = tokens(1, 60)[0], torch.arange(52, 60), reader(model)
    look = dataclasses.replace(Look("true", 10**6, reading=True), **changed)
    memory = ours.read(ids[:44], Look("true", 10**6))
    found = ours.look(look, ids, memory, places, asked=50)
    torch.testing.assert_close(found.logits, model(ids[None]).logits[0, 51:59])


@torch.no_grad()
def test_without_a_look_only_the_window_is_seen(model: PreTrainedModel) -> None:
    ids, ours = tokens(1, 60)[0], reader(model)
    distance = torch.arange(60)[:, None] - torch.arange(60)
    mask = torch.where((distance >= 0) & (distance < WINDOW), 0.0, -torch.inf)[None, None]
    memory = ours.read(ids)
    exact = model.get_decoder()(ids[None], attention_mask=mask, output_hidden_states=True)
    last = model.get_decoder().layers[-1]
    k = last.self_attn.k_proj(last.input_layernorm(exact.hidden_states[-2][0]))
    torch.testing.assert_close(memory.keys[-1].transpose(0, 1).flatten(1), k)


@torch.no_grad()
def test_choices_hold_what_they_say(model: PreTrainedModel) -> None:
    ids, ours, places, fact = tokens(1, 400)[0], reader(model, sinks=2), torch.arange(396, 400), slice(30, 36)
    memory = ours.read(ids[:380])
    for choice in ("score", "blocks", "oracle", "found"):
        look = Look(choice=choice, slots=128, finders=2, heads=len(ours.order))
        for at, keys in zip(ours._choice(look, ids, memory, 390, fact), memory.keys, strict=True):
            assert at.shape[1] == 128 and (at.diff(dim=1) > 0).all() and 0 <= at.min() <= at.max() < keys.shape[1] - 10
        found = ours.look(look, ids, memory, places, 390, fact)
        assert choice != "oracle" or all(found.held.values())
        assert all(0 <= share <= 1 for share in found.shares.values())
    few = ours.look(Look(heads=1, sharp=2.0, top=4, bias=0.5), ids, memory, places, 390, fact)
    nothing = ours.look(None, ids, memory, places, 390)
    assert set(few.shares) == {ours.order[0]} and not nothing.shares
    assert not torch.equal(few.logits, nothing.logits)


def test_every_look_at_a_chat_and_a_text_is_a_row(model: PreTrainedModel) -> None:
    ids, ours = tokens(1, 720)[0], reader(model, sinks=2)
    some = [Look(), Look(tail=480), Look(reading=True), Look(choice="oracle", slots=64), Look(top=8)]
    every = far_looks.Looks(model, ours, some)
    chat = every.chat(far_looks.Text(ids, 700, slice(714, 720), slice(20, 30)), {}, True)
    assert set(chat) == {far_looks.NOTHING, *(look.name for look in some)}
    text = every.text(far_looks.Text(ids, 0), {far_looks.NOTHING: 1.0}, False)
    assert set(text) == {far_looks.FULL, some[0].name, some[4].name}  # the others need a chat, or are not wanted
    logits = model(ids[None]).logits[0, -240:-1]
    assert text[far_looks.FULL] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[-239:]).item(), abs=2e-5)
    shown = far_looks.table({("far", 0): chat, ("prose", 0): text})
    assert len(shown.splitlines()) == len(some) + 2 and "of  1" in shown


def test_all_looks_have_names_of_their_own() -> None:
    names = [look.name for look in far_looks.looks()]
    assert len(set(names)) == len(names)

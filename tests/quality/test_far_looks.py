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
import far_ranks
from real.looks import BLOCK, Look, Reader
from real.sharing import learn, learned, ranks

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
    for choice in ("score", "oracle", "blocks", "head blocks", "layer blocks", "found"):
        look = Look(choice=choice, slots=128, finders=2, heads=len(ours.order))
        count = 128 + (0 if choice in ("score", "oracle") else 370 % BLOCK)  # and the block that is filling
        for at, keys in zip(ours._choice(look, ids, memory, 390, fact), memory.keys, strict=True):
            assert (
                at.shape[1] == count and (at.diff(dim=1) > 0).all() and 0 <= at.min() <= at.max() < keys.shape[1] - 10
            )
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


@torch.no_grad()
def test_whose_scores_choose_blocks() -> None:
    """Of every choice by scores: the blocks of each layer, from scores added up one by one."""
    model = base("llama", num_hidden_layers=3)
    ids, ours, text = tokens(1, 400)[0], reader(model, sinks=2), model.config
    layers, heads = text.num_hidden_layers, text.num_key_value_heads
    ours.order = [(2, 0), (1, heads - 1), (0, 0)]
    ours.learned = {1: Scorer(text.hidden_size, 1)}
    memory = ours.read(ids[:380])

    def best(chances: list[torch.Tensor]) -> list[int]:
        sums = [sum(float(x[n * BLOCK : (n + 1) * BLOCK].sum()) for x in chances) for n in range(370 // BLOCK)]
        return sorted(sorted(range(len(sums)), key=lambda n: -sums[n])[:2])

    def chosen(**changed: object) -> list[list[list[int]]]:
        look = Look(slots=128, **changed)  # type: ignore[arg-type]
        every = ours._choice(look, ids, memory, 390, None)
        assert every is not None
        return [[at[: 2 * BLOCK : BLOCK].div(BLOCK).long().tolist() for at in found] for found in every]

    chances = [x[:, 2:-WINDOW].sigmoid() for x in memory.scores]
    order = [chances[layer][head] for layer, head in ours.order]
    assert chosen(choice="head blocks") == [[best([x]) for x in chances[n]] for n in range(layers)]
    assert chosen(choice="layer blocks") == [[best(list(chances[n]))] for n in range(layers)]
    assert chosen(choice="blocks", finders=2) == [[best(order[:2])]] * layers
    assert chosen(choice="blocks", finders=2, layer=1) == [[[]]] + [[best(order[1:2])]] * (layers - 1)
    upto = [[n for n, (layer, _) in enumerate(ours.order[:2]) if layer <= number] for number in range(layers)]
    assert chosen(choice="blocks so far", finders=2) == [
        [best([order[n] for n in some]) if some else []] for some in upto
    ]
    own = ours.learned[1](next(x for n, x, _, _ in ours.layers(ids[:380]) if n == 1)[None])[0, 0, 2:-WINDOW].sigmoid()
    assert chosen(choice="learned", layer=1) == [[[]]] + [[best([own])]] * (layers - 1)


@torch.no_grad()
def test_layers_before_a_shared_choice_see_sinks_and_window(model: PreTrainedModel) -> None:
    ids, ours, places = tokens(1, 400)[0], reader(model, sinks=2), torch.arange(396, 400)
    last = model.config.num_hidden_layers
    ours.learned = {last: Scorer(model.config.hidden_size, 1)}
    memory = ours.read(ids[:380])
    memory.learned[last] = torch.zeros(1, 380)
    look = Look(choice="learned", slots=128, layer=last)
    nothing = ours.look(None, ids, memory, places, 390)
    torch.testing.assert_close(ours.look(look, ids, memory, places, 390).logits, nothing.logits)


def test_one_score_is_learned_from_many(model: PreTrainedModel) -> None:
    """What a layer's own heads say together: most of its variance is told."""
    ours = reader(model, sinks=2)
    ours.order = [(1, head) for head in range(model.config.num_key_value_heads)]
    with torch.no_grad():
        for parameter in ours.scorers[1].parameters():
            parameter *= 3
    texts, held_out = tokens(4, 300), tokens(1, 300, seed=9)[0]
    torch.manual_seed(0)
    found = learned(ours, texts, [1], 2, steps=200, batch=512)[1]
    x = next(x for n, x, _, _ in ours.layers(held_out) if n == 1)
    wanted = ours.scored(ours.scorers[1], x).sigmoid().mean(0)
    told = ours.scored(found, x)[0].sigmoid()
    assert float((told - wanted).square().mean()) < 0.25 * float(wanted.var())
    blind = learn(torch.zeros_like(x), wanted, steps=50)
    assert float((ours.scored(blind, x * 0)[0].sigmoid() - wanted).square().mean()) > 0.5 * float(wanted.var())


def test_ranks_count_blocks_above_the_facts_worst() -> None:
    ratings = torch.zeros(2, 6 * BLOCK + 5)
    for block, total in enumerate((5, 1, 4, 2, 3, 0)):
        ratings[0, block * BLOCK + 7] = total
    ratings[1] = -ratings[0]
    ratings[:, 6 * BLOCK :] = 100  # the block that is filling is none of them
    assert ranks(ratings, slice(2 * BLOCK + 3, 3 * BLOCK)).tolist() == [1, 4]
    assert ranks(ratings, slice(2 * BLOCK + 3, 3 * BLOCK + 1)).tolist() == [3, 4]


def test_ranks_from_pieces_are_those_of_the_text(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token that all scorers rate high: nothing is above its block, and everything above one without it."""
    monkeypatch.setattr(far_ranks, "LAYERS", (1,))
    monkeypatch.setattr(far_ranks, "choices", lambda: {"heads": Look(choice="head blocks", slots=64)})
    torch.manual_seed(0)
    ours, ids = reader(model, sinks=2), torch.randint(10, 60, (9000,))
    ids[6000:6020] = 3
    facts = [slice(5990, 6030), slice(3000, 3040)]
    monkeypatch.setattr(far_looks, "AROUND", (10, 10))
    chats = [far_looks.Text(ids, 8000, slice(8010, 8020), fact) for fact in facts]
    assert chats[0].said == slice(6000, 6020)

    def scored(scorer: Scorer, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs - planted).abs().sum(-1).lt(1e-4).float().expand(2, -1) * 9 - 4

    planted = model.get_decoder().layers[0].input_layernorm(model.get_input_embeddings().weight[3])
    monkeypatch.setattr(ours, "scored", scored)
    asked = []
    for number, text in enumerate(chats):
        parts = far_ranks.pieces(text, 2, number)
        assert all((part.start - 2) % BLOCK == 0 for part in parts) and parts[0].stop > text.fact.stop
        segments = torch.tensor([[part.start for part in parts], [part.stop for part in parts]])
        found = {"segments": segments}
        for k, part in enumerate(parts):
            some = far_ranks.read(ours, torch.cat([ids[:2], ids[part]]), 2)
            found |= {f"{k}.{name}": x for name, x in some.items()}
        asked.append(found)
    [(name, above, others)] = far_ranks.ranked(ours, chats, asked)
    assert name == "heads" and others > 40
    heads = model.config.num_key_value_heads
    assert (above[0, :heads] == 0).all() and (above[:, heads:] == 0).all()  # the second layer's inputs are others

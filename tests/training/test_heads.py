"""Heads that copy from far back are found, and scores learn in them alone."""

from __future__ import annotations

import pytest
import torch
from models import base, tokens
from transformers import PreTrainedModel

import ahn
from ahn.errors import AHNError
from ahn.training.heads import copied, most_copying
from ahn.training.looks import looks_loss
from ahn.training.losses import IGNORED

W, S = 8, 2
SAID = torch.tensor([7, 11, 13, 17, 19])


def batch(replies: tuple[slice, ...] = (slice(26, 31), slice(38, 40))) -> dict[str, torch.Tensor]:
    """Replies whose words stand at 4 to 8, and, too near to count, right before them."""
    ids = tokens(1, 40)
    labels = torch.full_like(ids, IGNORED)
    ids[0, 4:9] = SAID
    for reply in replies:
        count = reply.stop - reply.start
        for start in (reply.start, reply.start - count):
            ids[0, start : start + count] = SAID[:count]
        labels[0, reply] = SAID[:count]
    return {"input_ids": ids, "labels": labels}


def by_hand(model: PreTrainedModel, given: dict[str, torch.Tensor], reply: slice) -> list[dict[tuple[int, int], float]]:
    """Of each token of a reply, from the weights that eager attention gives."""
    weights, shares = model(given["input_ids"], output_attentions=True).attentions, []
    ids, count = given["input_ids"][0].tolist(), reply.stop - reply.start
    said = [n for n in range(reply.start - W + 1) if ids[n : n + count] == SAID[:count].tolist()]
    for place in range(reply.start, reply.stop):
        far = [n for start in said for n in range(start, start + count) if S <= n <= place - 1 - W]
        own = {(layer, key): weights[layer][0, 2 * key : 2 * key + 2, place - 1] for layer in (0, 1) for key in (0, 1)}
        shares.append({head: float(x[:, far].sum(-1).max()) for head, x in own.items()})
    return shares


@torch.no_grad()
def test_shares_are_those_of_full_attention() -> None:
    model, given = base(attn_implementation="eager"), batch()
    expected = [*by_hand(model, given, slice(26, 31)), *by_hand(model, given, slice(38, 40))]
    ahn.attach(model, ahn.AHNConfig("retained", W, S))
    found = copied(model, [given], W, S)
    assert found == pytest.approx({head: sum(x[head] for x in expected) / 7 for head in found}, rel=1e-4)
    assert len(found) == 4 and model.ahn_config.window == W and model.ahn_config.sinks == S


@torch.no_grad()
def test_padding_is_neither_far_nor_a_sink() -> None:
    model = ahn.attach(base(), ahn.AHNConfig("retained", W, S))
    plain, padded = batch(), batch()
    for name, fill in (("input_ids", 7), ("labels", IGNORED)):
        padded[name] = torch.cat([torch.full((1, 6), fill), padded[name]], dim=1)
    padded["attention_mask"] = (torch.arange(46) >= 6)[None].long()
    assert copied(model, [padded], W, S) == pytest.approx(copied(model, [plain], W, S), rel=1e-4)


def test_the_highest_are_chosen_and_bad_counts_refused() -> None:
    found = {(0, 0): 0.1, (0, 1): 0.5, (1, 0): 0.3, (1, 1): 0.2}
    assert most_copying(found, 2) == ((0, 1), (1, 0))
    for count in (0, 5):
        with pytest.raises(AHNError, match="4 key heads"):
            most_copying(found, count)
    model, given = ahn.attach(base(), ahn.AHNConfig("retained", W, S)), batch()
    given["labels"] = given["labels"].clamp_max(-1).fill_(IGNORED)
    with pytest.raises(AHNError, match="longer texts"):
        copied(model, [given], W, S)


def test_scores_of_few_heads_learn_what_all_heads_learn_there() -> None:
    few = ahn.attach(base(), ahn.AHNConfig("retained", W, S, slot_heads=((1, 1),)))
    every = ahn.attach(base(), ahn.AHNConfig("retained", W, S))
    with torch.no_grad():
        for name, parameter in ahn.adapter_parameters(few).items():
            other = ahn.adapter_parameters(every)[name]
            (other if other.shape == parameter.shape else other[1:]).copy_(parameter)
    for model in (few, every):
        looks_loss(model, batch(), W, S).loss.backward()
    name = next(name for name in ahn.adapter_parameters(few) if name.endswith("direct.weight"))
    found, expected = (ahn.adapter_parameters(model)[name].grad for model in (few, every))
    # All four heads share the mean of the other loss.
    assert torch.allclose(found, 4 * expected[1:], rtol=1e-4)

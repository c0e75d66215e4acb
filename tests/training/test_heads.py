"""Heads that look at one far token are found, and scores learn in them alone."""

from __future__ import annotations

import pytest
import torch
from models import base, tokens
from transformers import PreTrainedModel

import ahn
from ahn.errors import AHNError
from ahn.training.heads import most_peaked, peaks
from ahn.training.looks import looks_loss
from ahn.training.losses import IGNORED

W, S = 8, 2


def batch(length: int = 40, asked: tuple[int, ...] = (30, 39)) -> dict[str, torch.Tensor]:
    ids = tokens(1, length)
    labels = torch.full_like(ids, IGNORED)
    labels[:, list(asked)] = ids[:, list(asked)]
    return {"input_ids": ids, "labels": labels}


def by_hand(
    model: PreTrainedModel, given: dict[str, torch.Tensor], asked: tuple[int, ...]
) -> dict[tuple[int, int], float]:
    """From the weights that eager attention gives."""
    weights = model(given["input_ids"], output_attentions=True).attentions
    found = {}
    for layer, of_layer in enumerate(weights):
        for head in range(2):
            shared = of_layer[0, 2 * head : 2 * head + 2]
            found[layer, head] = sum(float(shared[:, n - 1, S : n - 1 - W + 1].max()) for n in asked) / len(asked)
    return found


@torch.no_grad()
def test_peaks_are_those_of_full_attention() -> None:
    model = base(attn_implementation="eager")
    expected = by_hand(model, batch(), (30, 39))
    ahn.attach(model, ahn.AHNConfig("retained", W, S))
    found = peaks(model, [batch()], W, S)
    assert found == pytest.approx(expected, rel=1e-4)
    assert model.ahn_config.window == W
    twice = peaks(model, [batch(), batch(asked=(35,))], W, S)
    alone = peaks(model, [batch(asked=(35,))], W, S)
    assert twice == pytest.approx({head: (2 * expected[head] + alone[head]) / 3 for head in expected}, rel=1e-4)


@torch.no_grad()
def test_padding_is_neither_far_nor_a_sink() -> None:
    model = ahn.attach(base(), ahn.AHNConfig("retained", W, S))
    plain, padded = batch(), batch()
    for name, fill in (("input_ids", 0), ("labels", IGNORED)):
        padded[name] = torch.cat([torch.full((1, 6), fill), padded[name]], dim=1)
    padded["attention_mask"] = (torch.arange(46) >= 6)[None].long()
    assert peaks(model, [padded], W, S) == pytest.approx(peaks(model, [plain], W, S), rel=1e-4)


def test_the_highest_are_chosen_and_bad_counts_refused() -> None:
    found = {(0, 0): 0.1, (0, 1): 0.5, (1, 0): 0.3, (1, 1): 0.2}
    assert most_peaked(found, 2) == ((0, 1), (1, 0))
    for count in (0, 5):
        with pytest.raises(AHNError, match="4 key heads"):
            most_peaked(found, count)
    model = ahn.attach(base(), ahn.AHNConfig("retained", W, S))
    with pytest.raises(AHNError, match="longer texts"):
        peaks(model, [batch(length=10, asked=(9,))], W, S)


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

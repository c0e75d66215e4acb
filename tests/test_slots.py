"""Learned exact slots: who holds a slot when, what attention makes of it, and how importance is learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import adapted, tokens
from torch import Tensor

import ahn
from ahn import slot_attention
from ahn.attention import Evicted
from ahn.errors import AHNError
from ahn.memory import slots
from ahn.memory.slots import ExactSlots
from ahn.visibility import Visibility

CPU = torch.device("cpu")


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, score: Tensor, window: int, sinks: int, capacity: int, scaling: float
) -> Tensor:
    """The definition, a token at a time, in float64: q (B, Hq, L, P), k, v (B, Hkv, L, P), score (B, Hkv, L)."""
    query, key, value, score = (x.double() for x in (query, key, value, score))
    groups = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            held: list[int] = []
            for t in range(query.shape[2]):
                gone = t - window
                if gone >= sinks:
                    rank = {j: float(score[b, h // groups, j]) + slots.RECENCY * j for j in [*held, gone]}
                    held = sorted(sorted(rank), key=lambda j: -rank[j])[:capacity]  # of equals the older
                exact = [j for j in range(t + 1) if j < sinks or j > t - window]
                bias = torch.nn.functional.logsigmoid(score[b, h // groups, held])
                seen = [*held, *exact]
                weight = key[b, h // groups, seen] @ query[b, h, t] * scaling
                weight[: len(held)] += bias
                out[b, h, t] = weight.softmax(0) @ value[b, h // groups, seen]
    return out


@given(
    window=st.integers(1, 6), sinks=st.integers(0, 4), length=st.integers(2, 34), share=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_token_at_a_time(window: int, sinks: int, length: int, share: int, seed: int) -> None:
    B, Hq, Hkv, P = 2, 4, 2, 8
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(B, Hq, length, P, generator=random)
    key, value = (torch.randn(B, Hkv, length, P, generator=random) for _ in range(2))
    gate = torch.randn(B, Hq, length, generator=random)
    view = Visibility(window, sinks, 0, length, CPU)
    if not view.evicted:
        return
    memory = ExactSlots(16, Hq, P)
    left = Evicted(*(view.evicted_slots(x) for x in (key, value)), {"importance": view.evicted_slots(gate)})
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(slots, "SHARE", share)
        score = memory.importance(gate, Hkv)
        expected = one_by_one(query, key, value, score, window, sinks, memory.slot_count(window), 0.5)
        for cached in (False, True):
            found, state = slot_attention.attend(memory, query, key, value, left, view, None, {}, cached, 0.5)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)  # float32, sums of 34 terms
            assert ("slot_keys" in state) == cached


def test_what_is_important_stays_in_sight() -> None:
    """A needle with the highest score is seen at any distance; the same token with the lowest is not."""
    L, window, P = 60, 4, 8
    key, value, query = (torch.randn(1, 1, L, P) for _ in range(3))
    view = Visibility(window, 0, 0, L, CPU)
    memory = ExactSlots(16, 1, P)
    for score, seen in ((9.0, True), (-9.0, False)):
        gate = torch.zeros(1, 1, L)
        gate[..., 3] = score
        outs = []
        for change in (0.0, 1.0):
            changed = value.clone()
            changed[:, :, 3] += change
            left = Evicted(*(view.evicted_slots(x) for x in (key, changed)), {"importance": view.evicted_slots(gate)})
            with torch.no_grad():
                outs.append(slot_attention.attend(memory, query, key, changed, left, view, None, {}, False, 0.3)[0])
        assert bool((outs[0][:, :, -1] != outs[1][:, :, -1]).any()) == seen


def test_importance_has_a_price_and_a_gradient() -> None:
    """Without any effect on the loss, every importance falls; by the derivative of PRICE · sigmoid a token."""
    memory = ExactSlots(16, 2, 8)
    gate = torch.randn(3, 2, 5, requires_grad=True)
    score = memory.importance(gate, 1)
    score.backward(torch.zeros_like(score))
    held = torch.sigmoid(gate.detach().mean(1, keepdim=True))
    expected = slots.PRICE * held * (1 - held) / 15 / 2
    torch.testing.assert_close(gate.grad, expected.expand_as(gate))


def test_priorities_are_a_sample_only_under_gradients() -> None:
    memory, positions = ExactSlots(16, 2, 8), torch.arange(5)[None]
    gate = torch.randn(1, 2, 5)
    calm = memory.priority(memory.importance(gate, 1), positions)
    assert torch.equal(calm, memory.priority(memory.importance(gate, 1), positions))
    gate.requires_grad_()
    assert not torch.equal(calm, memory.priority(memory.importance(gate, 1), positions))


def test_a_budget_is_window_and_slots() -> None:
    for keys in (1, 7, 480, 32640):
        if keys < 4:
            with pytest.raises(AHNError, match="no room for the slots of slots"):
                ahn.memory.window_within("slots", keys)
            continue
        window = ahn.memory.window_within("slots", keys)
        assert window + ahn.memory.slot_count("slots", window) <= keys < (window + 1) * 4


def test_models_with_scores_of_their_own_are_refused() -> None:
    model = adapted("gpt_oss", memory="slots", window=6, sinks=2)
    with pytest.raises(AHNError, match="needs plain attention"), torch.no_grad():
        model(tokens(1, 20))


def test_the_cache_stops_growing_and_is_saved(tmp_path: object) -> None:
    model = adapted(memory="slots", window=5, sinks=2)
    cache = ahn.AHNCache.for_model(model)
    sizes = []
    with torch.no_grad():
        for _ in range(6):
            model(tokens(1, 17), past_key_values=cache)
            sizes.append(cache.nbytes())
    assert sizes[1:] == sizes[:1] * 5
    path = tmp_path / "book.safetensors"
    cache.save(path)
    found = ahn.AHNCache.load(path, model)
    ids = tokens(1, 3, seed=5)
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=found).logits, model(ids, past_key_values=cache).logits)

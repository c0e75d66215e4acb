"""Forward numbers of the published implementation: logits, kept keys and states, however the tokens are fed."""

from __future__ import annotations

import pytest
import torch
from golden import CASES, golden_error, load_case, name

import ahn

TOLERANCE = 1e-4  # float32 against float32 in another order of operations (docs/spec.md, section 9)


@pytest.fixture(params=CASES, ids=name)
def case(request: pytest.FixtureRequest):
    model, config, expected = load_case(request.param)
    return model, config, request.param, expected


@torch.no_grad()
def test_prefill_then_steps(case) -> None:
    model, config, description, expected = case
    ids, length = expected["input_ids"], description["prefill_length"]
    cache = ahn.AHNCache.for_model(model)
    logits = model(ids[:, :length], past_key_values=cache).logits
    assert golden_error(logits, expected["prefill_logits"]) < TOLERANCE
    for index, layer in cache.memory_layers.items():
        assert layer.keys.shape[2] == config.lossless
        assert golden_error(layer.keys, expected[f"cached_keys_after_prefill.{index}"]) < TOLERANCE
    _assert_states(cache, description, expected, "state_after_prefill")
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(length, ids.shape[1])]
    assert golden_error(torch.cat(steps, dim=1), expected["decode_logits"]) < TOLERANCE
    _assert_states(cache, description, expected, "state_after_decode")


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_everything_at_once(case, use_cache: bool) -> None:
    model, _, _, expected = case
    published = torch.cat([expected["prefill_logits"], expected["decode_logits"]], dim=1)
    logits = model(expected["input_ids"], use_cache=use_cache).logits
    assert golden_error(logits, published) < TOLERANCE


@torch.no_grad()
def test_teacher(case) -> None:
    model, _, description, expected = case
    with ahn.disabled(model):
        logits = model(expected["input_ids"][:, : description["prefill_length"]]).logits
    assert golden_error(logits, expected["teacher_logits"]) < TOLERANCE


def _assert_states(cache: ahn.AHNCache, description: dict, expected: dict, name: str) -> None:
    for index, layer in cache.memory_layers.items():
        state = layer.state.memory["state"]
        if description["ahn"] == "Mamba2":
            state = state.mT  # published as (value, key), ours is (key, value)
        assert golden_error(state, expected[f"{name}.{index}"]) < TOLERANCE

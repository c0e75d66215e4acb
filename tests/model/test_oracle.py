"""The oracle against the published implementation, and the package against the oracle where nothing is published."""

from __future__ import annotations

import oracle
import pytest
import torch
from golden import CASES, Case, draw_weights, golden_error, relative_error
from golden import expected as published
from golden import name as case_name
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MEMORIES, adapted, awaken, base, tokens
from support.effort import examples

import ahn
from ahn import AHNCache, memory

TOLERANCE = 1e-4  # float32, of the published numbers and of the package


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_oracle_is_the_published_implementation(case: Case) -> None:
    base, adapter = draw_weights(case)
    weights = {name: x.double() for name, x in (base | adapter).items()}
    expected = published(case)
    ids, length = expected["input_ids"], case["prefill_length"]
    window, sinks = case["sliding_window"], case["num_attn_sinks"]
    logits, keys, states = oracle.decoder(case, weights, ids, window, sinks, (length,))
    assert golden_error(logits[:, :length], expected["prefill_logits"]) < TOLERANCE
    assert golden_error(logits[:, length:], expected["decode_logits"]) < TOLERANCE
    kept = [*range(sinks), *range(length - window, length)]
    for i, (key, (state,)) in enumerate(zip(keys, states, strict=True)):
        assert golden_error(key[:, :, kept], expected[f"cached_keys_after_prefill.{i}"]) < TOLERANCE
        state = state.mT if case["ahn"] == "Mamba2" else state
        assert golden_error(state, expected[f"state_after_prefill.{i}"]) < TOLERANCE


@pytest.mark.sample(6)
@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("q_proj", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("name", [name for name in MEMORIES if memory.get(name).published_name in oracle.MEMORIES])
@given(window=st.integers(1, 10), sinks=st.integers(0, 4), prefill=st.integers(1, 24))
@settings(max_examples=examples(1, 3))
def test_options_follow_the_specification(
    name: str, family: str, q_proj: bool, router: bool, window: int, sinks: int, prefill: int
) -> None:
    """Router and q_proj, which the published implementation has but cannot run; a prefill, then steps."""
    model = adapted(family, memory=name, window=window, sinks=sinks, router=router, q_proj=q_proj)
    config, ids = model.config, tokens(2, 25)
    case = config.to_dict() | {
        "ahn": memory.get(name).published_name,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    weights = {name: x.double() for name, x in model.state_dict().items()}
    with torch.no_grad():
        expected, _, _ = oracle.decoder(case, weights, ids, window, sinks)
        cache = AHNCache.for_model(model)
        parts = [model(ids[:, :prefill], past_key_values=cache).logits]
        parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(prefill, 25)]
    assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("distance", [0, 64], ids=["own", "near"])
@pytest.mark.parametrize("first", [None, 1])
@given(
    window=st.integers(1, 10),
    sinks=st.integers(0, 4),
    prefill=st.integers(1, 40),
    kept=st.one_of(st.tuples(st.integers(2, 26), st.just(1)), st.sampled_from([(16, 2), (18, 2), (24, 3), (36, 4)])),
)
@settings(max_examples=examples(2, 8))
def test_retained_tokens_follow_the_definition(
    family: str, first: int | None, distance: int, window: int, sinks: int, prefill: int, kept: tuple[int, int]
) -> None:
    """At own positions, or never seen from farther than a quarter of what the base knows; alone or in passages; by
    scores of all heads of all layers, or of one layer for all."""
    slots, passage = kept
    layers = {} if first is None else {"num_hidden_layers": 3}
    kept_by = {"slots": slots, "passage": passage, "score_layer": first}
    reach = ahn.AHNConfig("retained", window, sinks, max_distance=distance, key_bits=16, value_bits=16, **kept_by)
    model = awaken(ahn.attach(base(family, **layers), reach))
    config, ids = model.config, tokens(2, 41)
    case = config.to_dict() | {"ahn": "RetainedTokens", "rope_theta": config.rope_parameters["rope_theta"]}
    weights = {name: x.double() for name, x in model.state_dict().items()}
    with torch.no_grad():
        case |= kept_by | {"near": max(16, window + sinks + 4) if distance else 0}
        expected, _, _ = oracle.decoder(case, weights, ids, window, sinks)
        cache = AHNCache.for_model(model)
        parts = [model(ids[:, :prefill], past_key_values=cache).logits]
        parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(prefill, 41)]
    assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE

"""The scan's gradients in kernels against autograd through the recurrences, one token at a time in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from golden import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RECURRENT, adapted, tokens
from support.effort import examples, slow
from support.kernels import INTERPRETED, NAMES
from support.scans import FLOAT32, GATES, errors_of, inputs, several_states
from torch import Tensor

from ahn.attend import spans
from ahn.ops import scan

# Of a chunk's products the backward repeats those of the forward and takes products of their results.
BACKWARD = 2
# Decay between two tokens is the exponential of a difference of sums over a chunk, each a scan of 6 additions deep.
SUMS = 2 * 6 * 2**-24


def bound(arguments: dict[str, Tensor | None]) -> float:
    """What float32 leaves: rounding of products, and of sums of logarithms, large where much is forgotten."""
    decay = arguments["decay"]
    largest = 0.0 if decay is None else max(float(part.sum(-1).abs().max()) for part in decay.split(64, dim=-1))
    return BACKWARD * FLOAT32 + SUMS * largest


@pytest.mark.sample(3)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "P"),
    [(1, 1, 1, 16), (64, 2, 1, 16), (65, 2, 1, 32), slow(65, 4, 2, 16), slow(150, 2, 2, 32)],
)
def test_gradients(name: str, tokens: int, heads: int, kv_heads: int, P: int) -> None:
    arguments = inputs(name, tokens, heads, kv_heads, P, torch.float32)
    errors = errors_of(name, arguments)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.sample(1)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize(("kv_heads", "groups", "states"), [slow(2, 3, 4), (2, 2, 2), slow(2, 1, 2), (1, 5, 2)])
def test_gradients_of_what_several_states_share(kv_heads: int, groups: int, states: int) -> None:
    arguments = several_states(70, 16, torch.float32, kv_heads, groups, states)  # more than a chunk
    errors = errors_of("deltanet", arguments)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.sample(1)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("gated_deltanet", "forgets"),
        ("gated_deltanet", "keeps"),
        ("gated_deltanet", "closed"),
        ("mamba2", "forgets"),
        ("mamba2", "closed"),
        ("deltanet", "closed"),
        slow("mamba2", "keeps"),
        slow("deltanet", "forgets"),  # it has no decay; its gate is as open as with "keeps"
        slow("deltanet", "keeps"),
    ],
)
def test_gates_at_their_ends(name: str, gates: str) -> None:
    arguments = inputs(name, 130, 2, 1, 16, torch.float32, gates)
    errors = errors_of(name, arguments)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.sample(1)
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_last_state_alone(name: str) -> None:
    arguments = inputs(name, 70, 2, 1, 16, torch.float32)
    errors = errors_of(name, arguments, read=0.0)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.sample(1)
@pytest.mark.usefixtures("triton")
@pytest.mark.skipif(not INTERPRETED, reason="kernels take no float32 on a GPU; tests/gpu has the same in bfloat16")
@pytest.mark.parametrize(
    "options", [slow({}, id="plain"), pytest.param({"router": True, "q_proj": True}, id="options")]
)
@pytest.mark.parametrize("memory", [slow(name) if name == "deltanet" else name for name in RECURRENT])
def test_a_model_learns_the_same(memory: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients of every parameter of memory and base: all in kernels as on a GPU, and in plain torch."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    model = adapted("qwen3", memory=memory, window=6, sinks=2, **options)
    ids, found = tokens(1, 30), []
    for kernels in (False, True):
        for place, ask in ((scan, "has_kernel"), (spans, "supported")):
            monkeypatch.setattr(place, ask, lambda query, kernels=kernels: kernels)
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        (logits * torch.arange(logits.numel()).view_as(logits).sin()).sum().backward()
        gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        found.append({"logits": logits.detach()} | gradients)
    assert found[0].keys() == found[1].keys() and any("ahn" in name for name in found[0])
    errors = {name: relative_error(found[1][name], x) * min(1.0, float(x.norm())) for name, x in found[0].items()}
    assert max(errors.values()) < 1e-4, errors  # float32 through two layers with sharp attention, forth and back


@pytest.mark.usefixtures("triton")
@given(
    name=st.sampled_from(NAMES),
    tokens=st.integers(1, 140),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    gates=st.sampled_from(list(GATES)),
    read=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=examples(3, 8))
def test_any_shape(name: str, tokens: int, kv_heads: int, groups: int, gates: str, read: float) -> None:
    arguments = inputs(name, tokens, kv_heads * groups, kv_heads, 16, torch.float32, gates)
    errors = errors_of(name, arguments, read)
    assert max(errors.values()) < bound(arguments), errors

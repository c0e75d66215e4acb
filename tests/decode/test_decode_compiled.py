"""Captured steps that run compiled: what is compiled how often, and what is left of a layer after our fusions."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from captured import IN_PARTS, LOSSLESS, SINKS, TOLERANCE, WINDOW, shared, traces
from models import FEW, awaken, base, tokens
from support.effort import slow
from talk import Talk

import ahn


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("memory", "options"),
    [("gated_deltanet", {"router": True}), ("deltanet", {"q_proj": True})],
)
def test_layers_compile_once(memory: str, options: dict[str, bool], compiled: list[torch.fx.Graph]) -> None:
    """For all layers, all conversations of a batch size, and all lengths; the rotary embedding and the norm as well.

    In one piece, whatever the model was asked for before: transformers then leaves hooks on it.
    """
    config = ahn.AHNConfig(memory=memory, window=WINDOW, sinks=SINKS, **options)
    model = awaken(ahn.attach(base(num_hidden_layers=4), config))
    with torch.no_grad():
        model(tokens(1, 5), output_hidden_states=True, output_attentions=True)
    before = traces(model)
    for length in (LOSSLESS - 1, 30):
        talk = Talk(model, 1)
        talk.read([length])
        talk.steps(3)
        talk.check(TOLERANCE)
        assert len(compiled) == 3 and traces(model) == before
    del talk
    gc.collect()  # modules that earlier conversations were captured with
    talk = Talk(model, 1)
    talk.read([20])
    talk.steps(2)
    assert len(compiled) == 3 and traces(model) == before
    talk = Talk(model, 2)
    talk.read([20, 13])
    talk.steps(2)
    talk.check(TOLERANCE)
    assert len(compiled) == 6, "another batch size"


@pytest.mark.slow
def test_the_layer_that_scores_and_the_others_compile_once_each(compiled: list[torch.fx.Graph]) -> None:
    config = ahn.AHNConfig("retained", WINDOW, SINKS, **FEW, passage=2, score_layer=1)
    model = awaken(ahn.attach(base(num_hidden_layers=5), config))
    talk = Talk(model, 2)
    talk.read([20, 13])
    talk.steps(20)
    talk.check(TOLERANCE)
    assert sum(any(node.target is torch.ops.ahn.step.default for node in graph.nodes) for graph in compiled) == 2


@pytest.mark.parametrize("options", [{"disable": True}, slow({"backend": "eager"})], ids=["not traced", "traced"])
def test_what_a_user_compiled_stays_compiled(options: dict[str, Any], compiled: list[torch.fx.Graph]) -> None:
    """Before `attach` or after it, through captured steps and `detach`."""
    plain = base(num_hidden_layers=3)
    plain.model.layers[0].compile(**options)
    model = awaken(ahn.attach(plain, ahn.AHNConfig(memory="gated_deltanet", window=WINDOW, sinks=SINKS)))
    model.model.layers[2].compile(**options)
    model.model.norm.compile(**options)
    parts = [*model.model.layers, model.model.norm]
    theirs = [part._compiled_call_impl for part in parts]
    assert [impl is None for impl in theirs] == [False, True, False, False]
    talk = Talk(model, 1)
    talk.read([20])
    talk.steps(3)
    talk.check(TOLERANCE)
    assert compiled, "steps were captured"
    assert [part._compiled_call_impl for part in parts] == theirs
    ahn.detach(model)
    assert [part._compiled_call_impl for part in parts] == theirs


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("memory", IN_PARTS)
def test_a_layer_is_our_operators_and_nothing_else(
    architecture: str, memory: str, compiled: list[torch.fx.Graph]
) -> None:
    """A layer of one conversation's step is four products and a step. All else in its graph only names numbers anew.

    A memory that keeps tokens has its scorer besides: one more product, and what is done to a number per key head.
    """
    talk = Talk(shared(architecture, memory), 1)
    talk.read([20])
    talk.steps(20)
    talk.check(TOLERANCE)
    called = ([node.target for node in graph.nodes if node.op.startswith("call")] for graph in compiled)
    (layer,) = (targets for targets in called if torch.ops.ahn.step.default in targets)
    names = [getattr(target, "__name__", target) for target in layer]
    views = {"view", "narrow", "transpose", "unsqueeze", "getitem", "reshape", "contiguous"}
    scorer = ["bfloat16", "float", "float", "product.default", "silu"] if memory == "retained" else []
    expected = sorted(["product.default"] * 4 + ["step.default"] + scorer)
    assert sorted(name for name in names if name not in views) == expected

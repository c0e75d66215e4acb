"""The rotation of queries and keys in a layer's graph: found in models, and only where it is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import relative_error
from support.modeling import norm
from torch import Tensor

from ahn.decode.fusion import fuse
from ahn.layout.state import LayerState, WindowState
from ahn.ops.gate import Gate
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step.operator import layer_step
from ahn.ops.step.product import FEW
from ahn.ops.step.several import layer_read

B, H, HKV, P, S, W = 2, 4, 2, 8, 1, 3
RULE = StepRule("beta", None, True, 1e-6, 0.25, 1e-5, across_heads=False)
Heads = tuple[Tensor, Tensor, Tensor]
Turn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Heads]


def half_turn(x: Tensor) -> Tensor:
    """As modeling files write it."""
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + half_turn(x) * sin


def found_by(turn: Turn) -> dict[str, Any]:
    """What a step takes over of a turn of (query, key) into (query, key, memory's query); its numbers are compared."""
    r = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r)

    buffers = [normal(B, HKV, S + W, P), normal(B, HKV, S + W, P), normal(B, H, S + W).sigmoid(), normal(B, H, P, P)]
    read = normal(B, H), normal(P), normal(H, P, P)
    value, positions, active = normal(B, HKV, P), torch.tensor([2, 7]), torch.tensor([True, True])

    def layer(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, beta: Tensor, keys: Tensor,
        values: Tensor, ring: Tensor, state: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, m = turn(query.transpose(1, 2), key.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1), weight)
        gates = {"beta": Gate(beta, "sigmoid")}
        held = LayerState(WindowState(keys, values, {"beta": ring}, in_slots=True), memory={"state": state})
        finish = StepRead(m[:, :, 0], read[0], None, *read[1:])
        return layer_step(
            q[:, :, 0], k[:, :, 0], value, gates, positions, active, held, S, P**-0.5, RULE, finish
        )  # fmt: skip

    found: dict[str, Any] = {}

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        fuse(module.graph)
        module.graph.lint()
        module.recompile()
        (step,) = (node for node in module.graph.nodes if node.target is torch.ops.ahn.step.default)
        found.update(step.kwargs)
        found["left"] = sum(node.target is torch.cat for node in module.graph.nodes)
        return module.forward

    angle = normal(B, 1, P // 2).repeat(1, 1, 2)
    inputs = normal(B, 1, H, P), normal(B, 1, HKV, P), angle.cos(), angle.sin(), normal(P), normal(B, H)
    torch._dynamo.reset()
    with torch.no_grad():
        twin = [x.clone() for x in buffers]
        expected = layer(*inputs, *twin)
        y = torch.compile(layer, backend=backend, dynamic=False)(*inputs, *buffers)
    assert relative_error(y, expected) < 1e-5
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(buffers, twin, strict=True))
    return found


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    q = rope(q, cos, sin)
    return q, rope(k, cos, sin), q


def _after_norms(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    q, k = (norm(x.transpose(1, 2), w).transpose(1, 2) for x in (q, k))
    return _plain(q, k, cos, sin, w)


def _after_scales(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    return _plain(q * w, k * w, cos, sin, w)


@pytest.mark.sample(8)
@pytest.mark.parametrize("tokens", [1, 5, FEW, FEW + 1])
@pytest.mark.parametrize("turn", ["_plain", "_after_norms", "_other_angle", "_memory_apart"])
def test_a_rotation_of_several_tokens(turn: str, tokens: int) -> None:
    r = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r)

    T, G = S + 20, 20
    rings = [[normal(1, HKV, n, P), normal(1, HKV, n, P), normal(1, H, n).sigmoid()] for n in (T, G)]
    state, beta, value = normal(1, H, P, P), Gate(normal(1, H, tokens), "sigmoid"), normal(1, HKV, tokens, P)
    read, counts = (normal(1, H, tokens), None, normal(P), normal(H, P, P)), (torch.tensor([30]), torch.tensor([2]))

    def layer(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, window: list[Tensor], beside: list[Tensor]
    ) -> Tensor:
        turned = globals()[turn]
        q, k, m = turned(query.transpose(1, 2), key.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1), weight)
        held, kept = (WindowState(*x[:2], {"beta": x[2]}, in_slots=True) for x in (window, beside))
        whole = LayerState(held, memory={"state": state}, beside=kept)
        return layer_read(q, k, value, {"beta": beta}, *counts, whole, S, P**-0.5, RULE, StepRead(m, *read))

    found: dict[str, Any] = {}

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        fuse(module.graph)
        module.graph.lint()
        module.recompile()
        (step,) = (node for node in module.graph.nodes if node.target is torch.ops.ahn.several.default)
        found.update(step.kwargs)
        return module.forward

    angle = normal(1, tokens, P // 2).repeat(1, 1, 2)
    inputs = normal(1, tokens, H, P), normal(1, tokens, HKV, P), angle.cos(), angle.sin(), normal(P)
    torch._dynamo.reset()
    with torch.no_grad():
        twin = copy.deepcopy(rings)
        expected = layer(*inputs, *twin)
        y = torch.compile(layer, backend=backend, dynamic=False)(*inputs, *rings)
    assert relative_error(y, expected) < 1e-5
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(rings[1], twin[1], strict=True))
    assert ("cos" in found) == (turn in ("_plain", "_after_norms") and tokens <= FEW)
    assert (found.get("query_norm") is not None) == ("cos" in found and turn == "_after_norms")


def test_a_rotation_becomes_the_steps_own() -> None:
    found = found_by(_plain)
    assert not found["left"] and found["query_norm"] is None and found["key_norm"] is None


def test_so_do_the_norms_before_it() -> None:
    found = found_by(_after_norms)
    assert not found["left"] and found["query_norm"] is not None and found["query_eps"] == found["key_eps"] == 1e-6


def test_what_else_comes_before_it_stays() -> None:
    found = found_by(_after_scales)
    assert not found["left"] and found["query_norm"] is None


def _other_angle(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    q = rope(q, cos, sin)
    return q, rope(k, sin, cos), q


def _memory_apart(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    return rope(q, cos, sin), rope(k, cos, sin), rope(q * w, cos, sin)


def _turned_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    q, k = (x * cos + torch.cat((x[..., P // 2 :], -x[..., : P // 2]), dim=-1) * sin for x in (q, k))
    return q, k, q


def _other_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    q, k = (x * cos + torch.cat((-x[..., : P // 2], x[..., P // 2 :]), dim=-1) * sin for x in (q, k))
    return q, k, q


def _of_another(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    q = q * cos + half_turn(q * w) * sin
    return q, rope(k, cos, sin), q


def _a_part(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Heads:
    cos, sin = cos[..., : P // 2], sin[..., : P // 2]
    q, k = (torch.cat([rope(x[..., : P // 2], cos, sin), x[..., P // 2 :]], dim=-1) for x in (q, k))
    return q, k, q


@pytest.mark.parametrize("near", [_other_angle, _memory_apart, _turned_back, _other_halves, _of_another, _a_part])
def test_what_only_looks_like_one_is_still_right(near: Turn) -> None:
    assert "cos" not in found_by(near)

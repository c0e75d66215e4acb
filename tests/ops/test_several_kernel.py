"""Several tokens of a conversation at once over fixed slots: kernels against plain torch, that against single steps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from golden import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.effort import examples
from support.kernels import INTERPRETED, RULES, on_device

from ahn.layout.state import LayerState, WindowState
from ahn.ops.gate import Gate
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead
from ahn.ops.step import several
from ahn.ops.step.reference import StepRotation, by_steps, step

FLOAT32 = 1e-5  # float32 with full-precision products: sums of up to a few hundred terms, in another order


def made(rule, HKV, groups, P, S, W, G, N, start, held, seed, router=False, states=1, turn="none"):
    """Arguments of `several.read`; what no token has taken yet is NaN."""
    r = torch.Generator().manual_seed(seed)
    H, T = HKV * groups, S + W
    writers = H if states == 1 else HKV

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    def tokens(count, taken):
        empty = torch.arange(count) >= taken
        keys, values = (normal(1, HKV, count, P).masked_fill(empty[:, None], torch.nan) for _ in range(2))
        write = torch.sigmoid(normal(1, writers, count)).masked_fill(empty, torch.nan)
        decay = -torch.rand(1, H, count, generator=r).masked_fill(empty, torch.nan)
        gates = {} if rule is None else {name: x for name, x in ((rule.write, write), (rule.decay, decay)) if name}
        return WindowState(keys, values, gates)

    state, finish, gates = LayerState(tokens(T, start)), None, {}
    state.window.in_slots, state.beside = True, tokens(G, held)
    if rule is not None:
        state.memory = {"state": normal(1, writers * states, P, P)}
        gates = {rule.write: Gate(normal(1, writers, N), "sigmoid")}
        fading = Gate(normal(1, H, N), "softplus", normal(H), normal(H))
        gates |= {rule.decay: fading} if rule.decay else {}
        weight = torch.rand(1, H, N, generator=r) if router else None
        norm = normal(H * P if rule.across_heads else P)
        finish = StepRead(normal(1, H, N, P), normal(1, H, N), weight, norm, normal(H, P, P) / P**0.5)
        if states > 1:
            sizes = (H, P), (HKV, P), (H, states), (HKV, states)
            finish.routes = Routes(*(normal(heads, P, size) / P**0.5 for heads, size in sizes))
    new = normal(1, H, N, P), normal(1, HKV, N, P), normal(1, HKV, N, P)
    rotation = None
    if turn != "none" and by_steps(N, states > 1):
        angles = normal(1, 1, N, P // 2).repeat(1, 1, 1, 2)
        norms = (normal(P), normal(P), 1e-6, 1e-5) if turn == "after norms" else ()
        rotation = StepRotation(angles.cos(), angles.sin(), *norms)
    return new, gates, (torch.tensor([start]), torch.tensor([held])), state, (S, P**-0.5, rule, finish, rotation)


TURNS = st.sampled_from(["none", "plain", "after norms"])


@st.composite
def sizes(draw):
    S, W = draw(st.integers(0, 3)), draw(st.integers(8, 48))
    G = draw(st.integers(1, W))
    N = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16, 32) if n <= G]))  # 32: with the scan of many tokens
    around = st.integers(0, 4 * (S + W)) | st.sampled_from([S + W - 1, S + W, S + W + 1])
    return S, W, G, N, draw(around), draw(st.integers(0, G - N))


@pytest.mark.sample(2)
@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("name", RULES)
@given(sizes=sizes(), seed=st.integers(0, 99), router=st.booleans(), turn=TURNS)
@settings(max_examples=examples(3, 20))
def test_several_tokens_are_as_many_steps(name, states, sizes, seed, router, turn):
    rule = RULES[name]
    if states > 1 and (rule is None or rule.decay):
        states = 1
    S, W, G, N, start, held = sizes
    new, gates, counts, state, how = made(rule, 2, 2, 8, S, W, G, N, start, held, seed, router, states, turn)
    single = copy.deepcopy(state)
    out = several.read(*new, gates, *counts, state, *how)
    several.settle(counts[0], counts[1] + N, state, S, rule, None if how[3] is None else how[3].routes)
    beside, steps = state.beside, []
    for i in range(held + N):
        finish, rotation, t = *how[3:], max(0, i - held)
        pair = [None, None]
        if i < held:  # as they lie there
            own, turned = [new[0][:, :, 0], beside.keys[:, :, i], beside.values[:, :, i]], None
            if rule is not None:
                pair = [gate and Gate(beside.gates[gate][:, :, i]) for gate in (rule.write, rule.decay)]
        else:
            own, turned = [x[:, :, t] for x in new], rotation
            if rotation is not None:
                turned = dataclasses.replace(rotation, cos=rotation.cos[:, :, t], sin=rotation.sin[:, :, t])
            if rule is not None:
                parts = (gates.get(gate) for gate in (rule.write, rule.decay))
                pair = [gate and dataclasses.replace(gate, logits=gate.logits[:, :, t]) for gate in parts]
        if finish is not None:
            weight = None if finish.weight is None else finish.weight[:, :, t]
            finish = StepRead(
                finish.query[:, :, t], finish.gamma[:, :, t], weight, finish.norm, finish.o_proj, finish.routes
            )
        at = counts[0] + i
        steps.append(step(*own, *pair, at, torch.tensor([True]), single, S, how[1], rule, finish, turned))
    expected = torch.stack(steps[held:], dim=1)
    assert relative_error(out, expected) < FLOAT32
    for own, other in ((state, single),):
        for x, y in zip(own.tensors().values(), other.tensors().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=FLOAT32, atol=FLOAT32, equal_nan=True)


@pytest.mark.sample(2)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("name", RULES)
@given(sizes=sizes(), seed=st.integers(0, 99), router=st.booleans(), groups=st.integers(1, 3), turn=TURNS)
@settings(
    max_examples=examples(2, 10) if INTERPRETED else 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_kernels_are_the_plain_form(name, states, sizes, seed, router, groups, turn, monkeypatch):
    from ahn.ops.step import several_kernel

    rule = RULES[name]
    if states > 1 and (rule is None or rule.decay):
        states = 1
    S, W, G, N, start, held = sizes
    P = 16 if INTERPRETED else 64
    new, gates, counts, state, how = made(rule, 2, groups, P, S, W, G, N, start, held, seed, router, states, turn)
    other = on_device(copy.deepcopy(state))
    expected = several.read(*new, gates, *counts, state, *how)
    moved = [on_device(x) for x in new], {name: on_device(x) for name, x in gates.items()}
    here = [on_device(x) for x in counts]
    finish, rotation = (x if x is None else on_device(x) for x in how[3:])
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    found = several_kernel.read(*moved[0], moved[1], *here, other, *how[:3], finish, rotation, processors=4)
    assert relative_error(found.cpu(), expected) < FLOAT32
    count = torch.tensor([seed % (held + N + 1)])  # of which some may have been taken out again
    routes = None if finish is None else finish.routes
    several.settle(counts[0], count, state, S, rule, None if how[3] is None else how[3].routes)
    several_kernel.settle(here[0], on_device(count), other, S, rule, routes)
    for x, y in zip(other.tensors().values(), state.tensors().values(), strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=FLOAT32, atol=FLOAT32, equal_nan=True)

"""One decoding step over fixed slots: the kernels against plain torch, and plain torch against the recurrences."""

from __future__ import annotations

import copy

import pytest
import torch
from golden import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from support.effort import examples, slow
from support.kernels import INTERPRETED, RULES, on_device

from ahn.layout.rotation import Rotation
from ahn.layout.state import LayerState, TierRing, TierState, WindowState
from ahn.ops.basis import Basis
from ahn.ops.gate import ACTIVATIONS, Gate
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead
from ahn.ops.step.reference import StepRotation, step
from ahn.ops.step.retained import SeenTokens
from ahn.ops.step.turn import TierTurn

TURNS = ("none", "for all rows", "for each row", "after norms")  # how queries and keys come
# Float32 with full-precision products: sums of up to a few hundred terms, in another order.
FLOAT32 = 1e-5
SCALE = 1.25  # of angles, as YaRN has it
SEEN = 6  # among what `made` returns last, the tokens that are kept


def made(
    rule, B, HKV, groups, P, S, W, positions, seed, router=False, turn="none", activation="none", C=0, states=1,
    bits=(2, 2), reach=None,
):  # fmt: skip
    """Arguments of `step`; slots that no token has taken yet are NaN."""
    r = torch.Generator().manual_seed(seed)
    H, T = HKV * groups, S + W

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    positions = torch.tensor(positions)
    empty = torch.arange(T) >= positions[:, None]
    keys, values = (normal(B, HKV, T, P).masked_fill(empty[:, None, :, None], torch.nan) for _ in range(2))
    writers = H if states == 1 else HKV
    write = torch.sigmoid(normal(B, writers, T)).masked_fill(empty[:, None], torch.nan)
    decay = -torch.rand(B, H, T, generator=r).masked_fill(empty[:, None], torch.nan)
    state = normal(B, writers * states, P, P)
    active = torch.rand(B, generator=r) < 0.8
    write_gate, decay_gate = Gate(torch.sigmoid(normal(B, writers))), Gate(-torch.rand(B, H, generator=r))
    if activation != "none":
        # Logits as wide as softplus needs to be put to the test; a small rate, so that no state grows.
        write_gate = Gate(8 * normal(B, writers), activation, normal(writers))
        decay_gate = Gate(8 * normal(B, H), activation, None, normal(H) - 3)
    tier = made_tier(r, rule, B, HKV, writers, P, C, positions - T, bits) if C else None
    layer, read = LayerState(WindowState(keys, values, in_slots=True), tier), None
    if rule is not None:
        layer.window.gates, layer.memory = named_gates(rule, write, decay), {"state": state}
        norm = normal(H * P if rule.across_heads else P)
        weight = torch.rand(B, H, generator=r) if router else None
        read = StepRead(normal(B, H, P), normal(B, H), weight, norm, normal(H, P, P) / P**0.5)
        if states > 1:
            sizes = (H, P), (HKV, P), (H, states), (HKV, states)
            read.routes = Routes(*(normal(heads, P, size) / P**0.5 for heads, size in sizes))
    gates = (write_gate if rule else None, decay_gate if rule and rule.decay else None)
    rotation = None
    if turn != "none":
        angle = 10 * torch.rand(1 if turn == "for all rows" else B, 1, P // 2, generator=r).repeat(1, 1, 2)
        norms = (normal(P), normal(P), 1e-6, 1e-5) if turn == "after norms" else ()
        rotation = StepRotation(angle.cos(), angle.sin(), *norms)
    inputs = (normal(B, H, P), normal(B, HKV, P), normal(B, HKV, P), *gates, positions, active)
    turn = made_turn(B, P, S, W, C, reach, positions)
    return inputs, layer, (S, P**-0.5, rule, read, rotation, turn, None)


def made_seen(layer, B, HKV, P, kept, block, turning, room, heads):
    """Tokens that a memory keeps; scores wait in the window and in the tier."""
    for part in (layer.window, layer.tier) if layer.tier is not None else (layer.window,):
        part.gates = {"score": torch.randn(B, HKV, (part.keys if part is layer.window else part.keys.codes).shape[2])}
    keeps = range(HKV) if heads is None else heads
    rings = [torch.randn(B, len(keeps), count, P) for count in (kept + block, kept + block, block, block)]
    scores = torch.randn(B, len(keeps), kept + block)
    angles = torch.randn(B, 2, 2, P // 2).repeat(1, 1, 1, 2) if turning else None
    positions = torch.full((B, len(keeps), kept + block), -1, dtype=torch.int32)
    places = [keeps.index(head) if head in keeps else -1 for head in range(HKV)]
    own = None if heads is None else torch.tensor(places, dtype=torch.int32)
    return SeenTokens(*rings, scores, positions, angles, room, own)


def made_turn(B, P, S, W, C, reach, positions):
    """Keys before RoPE, seen up to the distance `reach` (0: at any), or after it (None)."""
    if reach is None:
        return None
    rotation = Rotation(lambda x, at: angles(at, P), lambda q, k, cos, sin: (q, k), SCALE)
    turn = TierTurn.of(rotation, torch.zeros(1), B, W, S, C, reach)
    turn.update(rotation, positions, W, C)
    return turn


def angles(positions, P):
    angle = (positions[..., None] * 100 ** (-torch.arange(P // 2) / (P // 2))).repeat(1, 1, 2)
    return SCALE * angle.cos(), SCALE * angle.sin()


def named_gates(rule, write, decay):
    return {name: x for name, x in ((rule.write, write), (rule.decay, decay)) if name}


def made_tier(r, rule, B, HKV, H, P, C, count, bits):
    """A tier that has taken in `count` (B,) tokens."""
    empty = torch.arange(C) >= count[:, None]
    codes = [torch.randint(256, (B, HKV, C, P * n // 8), dtype=torch.uint8, generator=r) for n in bits]
    scales = [torch.rand(B, HKV, C, generator=r).masked_fill(empty[:, None], torch.nan).bfloat16() for _ in range(2)]
    if INTERPRETED:  # the interpreter cuts numbers off where a GPU rounds them to bfloat16; see `compare`
        scales = [x.float() for x in scales]
    begun = (count > 0)[:, None, None]
    offsets = [torch.randn(B, HKV, P, generator=r).where(begun, 0) for _ in range(2)]
    write = torch.rand(B, H, C, generator=r).masked_fill(empty[:, None], torch.nan)
    decay = -torch.rand(B, H, C, generator=r).masked_fill(empty[:, None], torch.nan)
    rings = [TierRing(*parts) for parts in zip(codes, scales, offsets, strict=True)]
    return TierState(rings[0], rings[1], named_gates(rule, write, decay) if rule else {})


@pytest.mark.sample(2)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("C", [0, 30])
@pytest.mark.parametrize("turning", [False, True])
@given(data=st.data())
@settings(max_examples=examples(2, 10) if INTERPRETED else 5, derandomize=True)
def test_kernels_know_tokens_that_are_kept(C, turning, data):
    """Before and after the first token leaves, while blocks fill and when one is full."""
    S, W, kept, block = (data.draw(st.integers(*bounds)) for bounds in ((0, 5), (1, 60), (1, 150), (1, 20)))
    B, HKV, groups = (data.draw(st.integers(1, n)) for n in (3, 2, 5))
    first = S + W + C
    positions = [first + data.draw(st.integers(-2, 2) | st.integers(0, kept + 2 * block)) for _ in range(B)]
    turn, seed = data.draw(st.sampled_from(TURNS)), data.draw(st.integers(0, 99))
    positions = [max(0, position) for position in positions]
    inputs, layer, rest = made(None, B, HKV, groups, 32, S, W, positions, seed, turn=turn, C=C)
    torch.manual_seed(seed)
    room = data.draw(st.sampled_from([0, 1, 10]))  # of a base whose trained length is passed soon, or never
    heads = data.draw(st.sampled_from([None, [HKV - 1], [0]]))  # that keep tokens
    seen = made_seen(layer, B, HKV, 32, kept, block, turning, room, heads)
    score = Gate(torch.randn(B, HKV))
    compare((*inputs[:3], score, *inputs[4:]), layer, (*rest[:-1], seen))


def compare(inputs, state, rest, processors=8):
    from ahn.ops.step import kernel

    twin, other = copy.deepcopy(state), copy.deepcopy(rest)
    found_state = on_device(copy.deepcopy(state))
    found_rest = on_device(other)
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr(torch.Tensor, "bfloat16", lambda x: x)
        expected = step(*inputs, twin, *rest)
        found = kernel.step(*on_device(inputs), found_state, *found_rest, processors=processors)
    active = inputs[-1]
    if active.any():
        assert relative_error(found.cpu()[active], expected[active]) < FLOAT32
    kept, found_kept = ({} if seen is None else {**vars(seen)} for seen in (rest[SEEN], found_rest[SEEN]))
    for name, x in {**twin.tensors(), **kept}.items():
        if not isinstance(x, torch.Tensor):
            continue
        own = {**found_state.tensors(), **found_kept}[name].cpu()
        if x.dtype == torch.uint8:  # no number of these examples lies on the edge of two codes
            assert torch.equal(own, x), name
            continue
        assert torch.equal(x.isnan(), own.isnan())
        assert relative_error(own.nan_to_num(), x.nan_to_num()) < FLOAT32, name


@pytest.mark.sample(2)
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", RULES)
@given(data=st.data())
@settings(max_examples=examples(5, 12) if INTERPRETED else 5)
def test_kernels_are_the_plain_step(name, data):
    """Any window, any padding: rows before, at and after the first eviction, some of them paused."""
    S, W = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 150))
    B, HKV, groups = (data.draw(st.integers(1, n)) for n in (3, 2, 5))
    near = st.integers(max(0, S + W - 1), S + W + 1)
    positions = [data.draw(near | st.integers(0, 3 * (S + W))) for _ in range(B)]
    P = data.draw(st.sampled_from([16, 32]))
    seed, router = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    turn, activation = data.draw(st.sampled_from(TURNS)), data.draw(st.sampled_from(ACTIVATIONS))
    states = data.draw(st.sampled_from([1, 2, 4])) if name == "deltanet" else 1
    compare(*made(RULES[name], B, HKV, groups, P, S, W, positions, seed, router, turn, activation, states=states))


@pytest.mark.sample(2)
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["gated_deltanet", "deltanet", "window_only"])
@given(data=st.data())
@settings(max_examples=examples(2, 12) if INTERPRETED else 5, derandomize=True)
def test_kernels_are_the_plain_step_with_a_tier(name, data):
    """Rows before, at and after either edge, in rings that are empty, that fill and that go round."""
    S, W, C = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 60)), data.draw(st.integers(1, 150))
    B, HKV, groups = (data.draw(st.integers(1, n)) for n in (3, 2, 5))
    near = [st.integers(max(0, edge - 1), edge + 1) for edge in (S + W, S + W + C)]
    positions = [data.draw(near[0] | near[1] | st.integers(0, 3 * (S + W + C))) for _ in range(B)]
    P = data.draw(st.sampled_from([16, 32]))
    seed, turn = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(TURNS))
    states = data.draw(st.sampled_from([1, 4])) if name == "deltanet" else 1
    compare(*made(RULES[name], B, HKV, groups, P, S, W, positions, seed, turn=turn, C=C, states=states))


@pytest.mark.sample(3)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("bits", [(4, 2), (3, 2), (4, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("reach", ["none", 0, 90, 160])
@given(data=st.data())
@settings(max_examples=examples(2, 8) if INTERPRETED else 5, derandomize=True)
def test_kernels_know_every_form_of_the_tier(bits, reach, data):
    """Keys after RoPE or before it, seen from any distance or up to one that cuts through the tier."""
    S, W, C = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 80)), data.draw(st.integers(1, 200))
    B, HKV, groups = (data.draw(st.integers(1, n)) for n in (2, 2, 5))
    near = [st.integers(max(0, edge - 1), edge + 1) for edge in (S + W, S + W + C)]
    positions = [data.draw(near[0] | near[1] | st.integers(0, 3 * (S + W + C))) for _ in range(B)]
    name, turn = data.draw(st.sampled_from(["gated_deltanet", "window_only"])), data.draw(st.sampled_from(TURNS))
    seed, P = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([32, 64]))
    reach = None if reach == "none" else reach
    compare(*made(RULES[name], B, HKV, groups, P, S, W, positions, seed, turn=turn, C=C, bits=bits, reach=reach))


@pytest.mark.sample(3)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("value_bits", [2, 3, 4])
@pytest.mark.parametrize("reach", ["none", 0, 90, 160])
@given(data=st.data())
@settings(max_examples=examples(2, 8) if INTERPRETED else 5, derandomize=True)
def test_keys_in_a_calibrated_basis(value_bits, reach, data):
    """Before, at and after either edge; keys as they leave the window, or turned to near and far distances."""
    S, W, C = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 80)), data.draw(st.integers(1, 200))
    B, HKV, groups = (data.draw(st.integers(1, n)) for n in (3, 2, 5))
    near = [st.integers(max(0, edge - 1), edge + 1) for edge in (S + W, S + W + C)]
    positions = [data.draw(near[0] | near[1] | st.integers(0, 3 * (S + W + C))) for _ in range(B)]
    name, turn = (
        data.draw(st.sampled_from(["gated_deltanet", "deltanet", "window_only"])),
        data.draw(st.sampled_from(TURNS)),
    )
    seed, P = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([32, 64, 128]))
    inputs, layer, rest = made(
        RULES[name], B, HKV, groups, P, S, W, positions, seed, turn=turn, C=C, bits=(2, value_bits),
        reach=None if reach == "none" else reach,
    )  # fmt: skip
    compare(inputs, layer, (*rest, made_basis(HKV, P, seed)))


def made_basis(HKV, P, seed):
    """Directions that are not orthogonal, and of different weight."""
    r = torch.Generator().manual_seed(seed)
    deviations = torch.linspace(0, -2, P).exp().expand(HKV, P)
    return Basis.of(torch.randn(HKV, P, P, generator=r) / P**0.5 + 3 * torch.eye(P), deviations)


@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("codes", [0, 30])
def test_several_states_a_head(codes):
    """Rows before and after something leaves, in memory that was NaN."""
    compare(*made(RULES["deltanet"], 3, 2, 3, 32, 2, 20, [10, 22, 90], 1, turn="after norms", C=codes, states=4))


@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.sample(2)
@pytest.mark.parametrize("position", [slow(40), 44, 45, slow(100), 44 + 500, 44 + 501, slow(3000)])
def test_a_tier_in_many_parts(position):
    inputs, state, rest = made(RULES["gated_deltanet"], 1, 2, 2, 64, 4, 40, [position], seed=0, C=500)
    compare((*inputs[:-1], torch.tensor([True])), state, rest, processors=132)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("position", [slow(100), 8231])
def test_a_single_row_in_many_parts(position):
    """As many parts as there can be; most of them see nothing before the window is full, some never do."""
    from ahn.ops.step import kernel

    assert kernel.schedule(1, 8200, 64, 132)[0] == 256
    inputs, state, rest = made(RULES["gated_deltanet"], 1, 1, 2, 16, 4, 8196, [position], seed=0)
    compare((*inputs[:-1], torch.tensor([True])), state, rest, processors=132)

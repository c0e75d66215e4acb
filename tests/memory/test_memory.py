"""Memories against the specification's equations: reads, states, gradients, initial values, names and sizes.

Everything is parametrised over `ahn.memory.names()`. A new memory is tested by itself for what all memories promise;
its equations are tested once `oracle.MEMORIES` has them.
"""

from __future__ import annotations

from collections.abc import Mapping

import oracle
import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RECURRENT
from support.effort import examples
from torch import Tensor

from ahn import AHNError, memory, ops
from ahn.layout.evicted import Evicted, without_padding
from ahn.layout.visibility import Padding, Visibility
from ahn.memory import RecurrentMemory

D, H, HKV, P = 6, 2, 1, 4
FLOAT32 = 1e-5  # some tens of float32 operations (6e-8 each) one after the other
KNOWN = [name for name in RECURRENT if memory.get(name).published_name in oracle.MEMORIES]
every = pytest.mark.parametrize("name", RECURRENT)
equations = pytest.mark.parametrize("name", KNOWN)


@torch.no_grad()
def awake(
    name: str, hidden_size: int = D, heads: int = H, head_dim: int = P, kv_heads: int = HKV, **options: bool
) -> RecurrentMemory:
    """A memory with no parameter at its initial value."""
    fn = memory.get(name)(hidden_size, heads, head_dim, kv_heads, **options)
    for parameter in fn.parameters():
        parameter += 0.4 * torch.randn_like(parameter)
    return fn


def inputs(fn: RecurrentMemory, length: int, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Queries (B, H, N, P), keys, values (B, Hw, N, P), attention inputs of written and reading tokens (B, N, D)."""
    random = torch.Generator().manual_seed(seed)
    heads = {"q": H, "k": fn.write_heads, "v": fn.write_heads}
    made = {part: torch.randn(batch, count, length, P, generator=random) for part, count in heads.items()}
    return made | {part: torch.randn(batch, length, D, generator=random) for part in ("x_write", "x_read")}


def run(
    fn: RecurrentMemory, given: Mapping[str, Tensor], state: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What attention does with a memory: the read (B, H, N, P) and the state."""
    q, k, v, x_write, x_read = (given[part] for part in ("q", "k", "v", "x_write", "x_read"))
    state = fn.init_state(q.shape[0], q.device) if state is None else state
    o, state = fn.scan(q, k, v, fn.write_gates(x_write), state)
    return fn.read_out(o, x_read), state


def expected(fn: RecurrentMemory, w: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same in float64 by the specification's equations."""
    write, read = oracle.MEMORIES[fn.published_name]
    q, k, v, x_write, x_read = (given[part] for part in ("q", "k", "v", "x_write", "x_read"))
    S = torch.zeros(q.shape[0], k.shape[1], q.shape[3], q.shape[3], dtype=q.dtype)
    reads = []
    for n in range(q.shape[2]):
        S = write(w, S, k[:, :, n], v[:, :, n], x_write[:, n])
        reads.append(read(w, S, q[:, :, n], x_read[:, n]))
    return torch.stack(reads, dim=2), S.flatten(1, -3)  # states of all heads in a row


def double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double() for name, x in tensors.items()}


@equations
@given(length=st.integers(1, 80), seed=st.integers(0, 99))
@settings(max_examples=examples(6, 15))
def test_equations(name: str, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    fn = awake(name)
    given = inputs(fn, length, seed=seed)
    with torch.no_grad():
        read, state = run(fn, given)
    expected_read, expected_state = expected(fn, double(fn.state_dict()), double(given))
    assert relative_error(read, expected_read) < FLOAT32
    assert relative_error(state["state"], expected_state) < FLOAT32


@pytest.mark.sample(2)
@equations
def test_gradients_are_float64_finite_differences(name: str) -> None:
    """Of every parameter and every input: the package's float32 gradients against central differences of the oracle."""
    fn = awake(name)
    given = inputs(fn, 5, batch=1)
    leaves = {part: x.clone().requires_grad_() for part, x in given.items()}
    read, state = run(fn, leaves)
    weights = [torch.randn_like(read), torch.randn_like(state["state"])]
    ((read * weights[0]).sum() + (state["state"] * weights[1]).sum()).backward()
    found = {part: x.grad for part, x in (leaves | dict(fn.named_parameters())).items() if x.grad is not None}

    point = double(given) | double(fn.state_dict())

    def loss() -> float:
        read, state = expected(fn, point, point)
        return float((read * weights[0]).sum() + (state * weights[1]).sum())

    step = 1e-5  # the error of a central difference is about step²; of float64 rounding 1e-16 / step
    unused = {part for part in point if part not in found}
    assert unused <= {"D"}, "in published checkpoints, never used"
    for part, gradient in found.items():
        flat, differences = point[part].view(-1), torch.empty(gradient.numel(), dtype=torch.float64)
        for i in range(len(flat)):
            value = flat[i].item()
            flat[i] = value + step
            up = loss()
            flat[i] = value - step
            differences[i] = (up - loss()) / (2 * step)
            flat[i] = value
        assert relative_error(gradient.flatten(), differences) < 1e-4, part


@every
@given(cut=st.lists(st.integers(1, 70), min_size=1, max_size=4))
@settings(max_examples=10)
def test_in_pieces_or_at_once(name: str, cut: list[int]) -> None:
    torch.manual_seed(0)
    fn = awake(name)
    given = inputs(fn, sum(cut))
    with torch.no_grad():
        whole, whole_state = run(fn, given)
        state, reads, start = None, [], 0
        for length in cut:
            piece = {
                part: x[:, start : start + length] if part.startswith("x") else x[:, :, start : start + length]
                for part, x in given.items()
            }
            read, state = run(fn, piece, state)
            reads.append(read)
            start += length
    # Each is within FLOAT32 of the exact numbers (test_equations), and chunks begin at other tokens: two such errors.
    assert relative_error(torch.cat(reads, dim=2), whole) < 2 * FLOAT32
    for part, x in whole_state.items():
        assert relative_error(state[part], x) < 2 * FLOAT32


@every
def test_fast_is_the_reference(name: str) -> None:
    """Forward and every gradient, through gates and read-out."""
    fn = awake(name)
    given = inputs(fn, 150)
    results = {}
    for backend in ("reference", "chunked"):
        leaves = {part: x.clone().requires_grad_() for part, x in given.items()}
        fn.zero_grad()
        with ops.use_backend(backend):
            read, state = run(fn, leaves)
        sum((x * torch.cos(torch.arange(x.numel()).view_as(x))).sum() for x in (read, *state.values())).backward()
        gradients = {part: x.grad for part, x in (leaves | dict(fn.named_parameters())).items() if x.grad is not None}
        results[backend] = {"read": read.detach()} | {part: x.clone() for part, x in gradients.items()}
    errors = {part: relative_error(results["chunked"][part], x) for part, x in results["reference"].items()}
    assert max(errors.values()) < 1e-4, errors  # 150 steps of float32 backward, summed over tokens


@every
def test_gates(name: str) -> None:
    fn = awake(name)
    gates = fn.write_gates(torch.randn(2, 7, D).bfloat16())
    assert gates.keys() == fn.closed_gates.keys()
    for gate in gates.values():
        assert gate.dtype == torch.float32 and gate.shape[:3] == (2, fn.write_heads, 7)


@every
def test_closed_gates_leave_the_state_untouched(name: str) -> None:
    fn = awake(name)
    given = inputs(fn, 70)
    with torch.no_grad():
        _, before = run(fn, given)
        gates = {
            part: torch.full_like(g, fn.closed_gates[part]) for part, g in fn.write_gates(given["x_write"]).items()
        }
        for length in (1, 70):  # a step, chunks
            short = {part: g[:, :, :length] for part, g in gates.items()}
            _, after = fn.scan(*(given[part][:, :, :length] for part in ("q", "k", "v")), short, before)
            assert all(torch.equal(after[part], before[part]) for part in before)


@every
def test_poisoned_padding_reaches_nothing(name: str) -> None:
    """NaN in the columns of padding: keys, values, gates that are evicted, and queries that read."""
    fn, W, S, L = awake(name), 3, 1, 12
    pads = torch.tensor([0, 5])
    real = torch.arange(L) >= pads[:, None]
    none = Padding.none(2, torch.device("cpu"))
    view = Visibility(W, S, 0, L, torch.device("cpu"), none, none.advance(real))
    clean = inputs(fn, L)

    def write_and_read(given: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        slots = [view.evicted_slots(given[part]) for part in ("k", "v")]
        gates = {part: view.evicted_slots(gate) for part, gate in fn.write_gates(given["x_write"]).items()}
        left = without_padding(Evicted(*slots, gates), fn.closed_gates, view)
        q, x = given["q"][:, :, -view.evicted :], given["x_read"][:, -view.evicted :]
        o, state = fn.scan(q, left.key, left.value, left.gates, fn.init_state(2, q.device))
        return fn.read_out(o, x), state

    with torch.no_grad():
        poisoned = {
            part: x.masked_fill(~real[..., None] if x.dim() == 3 else ~real[:, None, :, None], float("nan"))
            for part, x in clean.items()
        }
        read, state = write_and_read(poisoned)
        expected_read, expected_state = write_and_read(clean)
    keep = real[:, None, -view.evicted :, None].expand_as(read)
    assert torch.equal(read[keep], expected_read[keep])
    assert all(torch.equal(state[part], expected_state[part]) for part in state)
    assert any(bool(x.any()) for x in state.values())


@every
def test_gradients_of_padding_are_finite(name: str) -> None:
    """A closed token is a zero key; the gradient of its norm must not be 0/0."""
    fn = awake(name)
    given = inputs(fn, 5)
    gates = fn.write_gates(given["x_write"])
    k = given["k"].clone()
    k[:, :, :3] = 0
    k.requires_grad_()
    o, _ = fn.scan(given["q"], k, given["v"], gates, fn.init_state(2, k.device))
    fn.read_out(o, given["x_read"]).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (k, *fn.parameters()) if x.grad is not None)


@every
def test_a_half_precision_module(name: str) -> None:
    """A memory that was cast with its model: gates, scan and state stay float32."""
    fn = awake(name)
    given = inputs(fn, 30)
    rounded = {part: x.bfloat16() for part, x in given.items()}
    with torch.no_grad():
        read, state = run(fn.bfloat16(), rounded)
        expected_read, expected_state = run(fn.float(), {part: x.float() for part, x in rounded.items()})
    assert all(x.dtype == torch.float32 for x in state.values())
    # Gates are one product in bfloat16 (relative step 2^-8), then go through exp and 30 writes.
    assert relative_error(read, expected_read) < 0.1
    assert all(relative_error(state[part], x) < 0.1 for part, x in expected_state.items())


# -- what published checkpoints and the specification fix --------------------------------------------------------------

SHAPES = {
    "GatedDeltaNet": {
        "b_proj.weight": (H, D), "a_proj.weight": (H, D), "g_proj.weight": (H, D), "A_log": (H,), "dt_bias": (H,),
        "D": (H,), "o_norm.weight": (P,), "o_proj.weight": (H, P, P),
    },
    "DeltaNet": {
        "b_proj.weight": (H, D), "g_proj.weight": (H, D), "o_norm.weight": (P,), "o_proj.weight": (H, P, P),
    },
    "RoutedDeltaNet": {
        "b_proj.weight": (HKV, D), "g_proj.weight": (H, D), "o_norm.weight": (P,), "o_proj.weight": (H, P, P),
        "q_map.weight": (H, P, P), "k_map.weight": (HKV, P, P), "q_route": (H, P, 8), "k_route": (HKV, P, 8),
    },
    "Mamba2": {
        "dt_proj.weight": (H, D), "dt_proj.bias": (H,), "g_proj.weight": (H, D), "g_proj.bias": (H,), "dt_bias": (H,),
        "A_log": (H,), "norm.weight": (H * P,), "o_proj.weight": (H, P, P),
    },
}  # fmt: skip
# Hidden size, heads, key heads, layers.
QWEN = {"3B": (2048, 16, 2, 36), "7B": (3584, 28, 4, 28), "14B": (5120, 40, 8, 48)}
MILLIONS = {
    "Mamba2": {"3B": "11.9", "7B": "18.6", "14B": "51.4"},
    "DeltaNet": {"3B": "11.8", "7B": "18.5", "14B": "51.1"},
    "GatedDeltaNet": {"3B": "13.0", "7B": "21.3", "14B": "61.0"},
    "RoutedDeltaNet": {"3B": "22.0", "7B": "31.7", "14B": "83.4"},
}


@equations
@pytest.mark.parametrize("q_proj", [False, True])
def test_names_and_shapes(name: str, q_proj: bool) -> None:
    cls = memory.get(name)
    wanted = SHAPES[cls.published_name] | ({"q_proj.weight": (H, P, P)} if q_proj else {})
    fn = cls(D, H, P, HKV, q_proj=q_proj)
    assert {part: tuple(x.shape) for part, x in fn.state_dict().items()} == wanted
    assert {part for part, _ in fn.named_parameters()} == wanted.keys()


@equations
@pytest.mark.parametrize("size", QWEN)
def test_parameter_counts(name: str, size: str) -> None:
    cls = memory.get(name)
    hidden_size, heads, kv_heads, layers = QWEN[size]
    with torch.device("meta"):
        count = layers * sum(p.numel() for p in cls(hidden_size, heads, 128, kv_heads).parameters())
    assert f"{count / 1e6:.1f}" == MILLIONS[cls.published_name][size]
    if (cls.published_name, size) == ("GatedDeltaNet", "3B"):
        assert count == 12_982_464


@every
def test_a_new_memory_reads_nothing(name: str) -> None:
    fn = memory.get(name)(D, H, P, HKV)
    given = inputs(fn, 9)
    with torch.no_grad():
        read, state = run(fn, given)
    assert not read.any() and any(bool(x.any()) for x in state.values())


@equations
def test_initial_values(name: str) -> None:
    fn = memory.get(name)(64, 64, 8, 32, q_proj=True)
    values = {part: x.detach() for part, x in fn.named_parameters()}
    assert not values.pop("o_proj.weight").any()
    for part in [part for part in values if part.endswith("proj.weight")]:
        # 4096 draws: the deviation is 0.02 to 0.02 / √8192 (6 standard errors), the mean 0 to 0.02 / 64.
        x = values.pop(part)
        assert abs(float(x.std()) - 0.02) < 6 * 0.02 / 8192**0.5 and abs(float(x.mean())) < 6 * 0.02 / 64, part
    if name == "mamba2":
        assert torch.equal(values.pop("A_log"), torch.arange(1.0, 65).log())
        assert (values.pop("dt_bias") == 1).all() and (values.pop("norm.weight") == 1).all()
        assert not values.pop("dt_proj.bias").any() and not values.pop("g_proj.bias").any()
    else:
        assert (values.pop("o_norm.weight") == 1).all()
    if name == "gated_deltanet":
        rates, step = values.pop("A_log").exp(), F.softplus(values.pop("dt_bias"))
        assert float(rates.min()) > 0 and 12 < float(rates.max()) <= 16  # U(0, 16)
        assert 9e-4 < float(step.min()) < 3e-3 and 3e-2 < float(step.max()) < 0.11  # log U(1e-3, 1e-1)
        assert (values.pop("D") == 1).all()
    if name == "routed_deltanet":
        assert not values.pop("q_map.weight").any() and not values.pop("k_map.weight").any()
        route = values.pop("k_route")
        assert torch.equal(values.pop("q_route"), route.repeat_interleave(2, 0)) and not torch.equal(route[0], route[1])
        torch.testing.assert_close(route.norm(dim=1), torch.ones(32, 8))
    assert not values


@every
def test_registry(name: str) -> None:
    cls = memory.get(name)
    assert cls.name == name and issubclass(cls, RecurrentMemory)
    assert memory.by_published_name(cls.published_name) is cls
    assert name not in memory.baselines() and list(memory.names()) == sorted(memory.names())
    with pytest.raises(AHNError, match=f"Unknown memory 'no such'.*{name}"):
        memory.get("no such")
    with pytest.raises(AHNError, match=f"Unknown AHN implementation 'no such'.*{cls.published_name}"):
        memory.by_published_name("no such")

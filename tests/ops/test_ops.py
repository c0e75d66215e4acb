"""The recurrences: chunked against the reference, forward and backward, and what extreme gates do to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ahn import AHNError, ops
from ahn.ops.scan import chunked, reference

# Float64 with gates and keys of ordinary size: a few thousand operations of relative error 1.1e-16 each.
EXACT = 1e-11
RULES = ("delta", "gated_delta", "decay")
Arguments = dict[str, Tensor]


def arguments(rule: str, shape: tuple[int, int, int, int, int], seed: int = 0, dtype=torch.float64) -> Arguments:
    """Random inputs of a rule; shape is (B, H, N, P_key, P_value). Keys have norm 1, gates their usual range."""
    B, H, N, K, V = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(dtype)

    made = {
        "q": normal(B, H, N, K),
        "k": F.normalize(normal(B, H, N, K), dim=-1),
        "v": normal(B, H, N, V),
        "beta": torch.sigmoid(normal(B, H, N)),
        "decay": -F.softplus(normal(B, H, N)),
        "state": normal(B, H, K, V),
    }
    if rule == "decay":
        del made["beta"]
    return made


def run(rule: str, module: object, given: Arguments, **options: int) -> tuple[Tensor, Tensor]:
    """(reads, state) of a rule as `module` computes it."""
    if rule == "decay":
        return module.decay_rule(given["q"], given["k"], given["v"], given["decay"], given["state"], **options)
    decay = given["decay"] if rule == "gated_delta" else None
    return module.delta_rule(given["q"], given["k"], given["v"], given["beta"], decay, given["state"], **options)


def outputs_and_gradients(rule: str, module: object, given: Arguments, **options: int) -> Arguments:
    """Reads, state, and gradients of a random projection of both."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    o, state = run(rule, module, leaves, **options)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in (o, state)]
    sum((x * w).sum() for x, w in zip((o, state), weights, strict=True)).backward()
    gradients = {f"grad_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {"o": o.detach(), "state": state.detach()} | gradients


def assert_close(found: Arguments, expected: Arguments, tolerance: float) -> None:
    """Relative to each tensor's norm, or to 1 where it is smaller: terms that cancel leave their rounding behind."""
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], x) * min(1.0, float(x.double().norm())) for name, x in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors  # NaN is not


shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 23), st.integers(1, 5), st.integers(1, 5))


@pytest.mark.parametrize("rule", RULES)
@given(shape=shapes, chunk=st.sampled_from([1, 2, 4, 8, 64]), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_chunked_is_the_reference(rule: str, shape: tuple[int, ...], chunk: int, seed: int) -> None:
    given = arguments(rule, shape, seed)
    found = outputs_and_gradients(rule, chunked, given, chunk=chunk)
    assert_close(found, outputs_and_gradients(rule, reference, given), EXACT)


@pytest.mark.sample(6)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [63, 64, 65, 200])
def test_float32_in_chunks_of_the_default_size(rule: str, length: int) -> None:
    given = arguments(rule, (2, 3, length, 16, 16))
    expected = outputs_and_gradients(rule, reference, given)
    found = outputs_and_gradients(rule, ops, {name: x.float() for name, x in given.items()})
    assert all(x.dtype == torch.float32 for x in found.values())
    assert_close(found, expected, 1e-5)  # 200 tokens of float32 (6e-8 each) one after the other, summed


@pytest.mark.sample(len(RULES))
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_finite_differences(rule: str, backend: str) -> None:
    given = {name: x.requires_grad_() for name, x in arguments(rule, (1, 2, 5, 3, 2)).items()}
    names = [name for name in given if not (rule == "delta" and name == "decay")]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with ops.use_backend(backend):
            return run(rule, ops, given | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(given[name] for name in names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("module", [reference, chunked], ids=["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_closed_gates_leave_the_state_untouched(rule: str, module: object, dtype: torch.dtype) -> None:
    """Bit for bit: a batch with padding must not drift."""
    given = arguments(rule, (2, 2, 70, 4, 4), dtype=dtype)
    given["decay"].zero_()
    given["v" if rule == "decay" else "beta"].zero_()
    _, state = run(rule, module, given)
    assert torch.equal(state, given["state"])


@pytest.mark.parametrize("rule", RULES)
@given(closed=st.lists(st.booleans(), min_size=2, max_size=40), chunk=st.sampled_from([4, 64]))
@settings(max_examples=20)
def test_a_closed_token_is_no_token(rule: str, closed: list[bool], chunk: int) -> None:
    given = arguments(rule, (1, 2, len(closed), 3, 3))
    shut = torch.tensor(closed)
    padded = {name: x.clone() for name, x in given.items()}
    for name in ("k", "v", "beta", "decay"):
        if name in padded:
            padded[name][:, :, shut] = 0
    short = {name: x if name == "state" else x[:, :, ~shut] for name, x in given.items()}
    if all(closed):
        return
    o, state = run(rule, chunked, padded, chunk=chunk)
    expected_o, expected_state = run(rule, reference, short)
    assert relative_error(o[:, :, ~shut], expected_o) < EXACT
    assert relative_error(state, expected_state) < EXACT


def _forget_all(given: Arguments) -> None:
    given["decay"].fill_(-50)


def _forget_now_and_then(given: Arguments) -> None:
    given["decay"].fill_(-1e-3)
    given["decay"][:, :, ::17] = -50


def _keep_all(given: Arguments) -> None:
    given["decay"].zero_()


def _all_or_nothing(given: Arguments) -> None:
    if "beta" in given:
        given["beta"] = (given["beta"] > 0.5).to(given["beta"].dtype)


@pytest.mark.sample(6)
@pytest.mark.parametrize("change", [_forget_all, _forget_now_and_then, _keep_all, _all_or_nothing])
@pytest.mark.parametrize("rule", RULES)
def test_extreme_gates(rule: str, change: Callable[[Arguments], None]) -> None:
    """exp(-50 · 64) is 0 and its reciprocal infinite: nothing may be computed through either."""
    given = arguments(rule, (1, 2, 130, 8, 8))
    change(given)
    expected = outputs_and_gradients(rule, reference, given)
    assert_close(outputs_and_gradients(rule, chunked, given), expected, 1e-9)
    # In float32 a cumulative log decay of up to 3200 is rounded by 3200 · 6e-8 = 2e-4, which exp turns relative.
    single = {name: x.float() for name, x in given.items()}
    assert_close(outputs_and_gradients(rule, chunked, single), expected, 1e-3)


@pytest.mark.parametrize("module", [reference, chunked], ids=["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_a_poisoned_query_spoils_only_its_own_read(rule: str, module: object) -> None:
    given = arguments(rule, (1, 2, 70, 4, 4))
    expected, expected_state = run(rule, module, given)
    given["q"][:, :, 33] = float("nan")
    o, state = run(rule, module, given)
    others = torch.arange(70) != 33
    assert torch.equal(o[:, :, others], expected[:, :, others])
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("rule", RULES)
def test_low_precision_inputs_keep_the_states_precision(rule: str) -> None:
    given = arguments(rule, (1, 2, 70, 8, 8), dtype=torch.float32)
    rounded = {name: x if name == "state" else x.bfloat16() for name, x in given.items()}
    o, state = run(rule, ops, rounded)
    expected, expected_state = run(rule, reference, {name: x.double() for name, x in rounded.items()})
    assert o.dtype == state.dtype == torch.float32
    assert relative_error(o, expected) < 1e-5 and relative_error(state, expected_state) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_lower_the_precision(rule: str, backend: str) -> None:
    given = arguments(rule, (1, 2, 70, 8, 8), dtype=torch.float32)
    with ops.use_backend(backend):
        expected = run(rule, ops, given)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(rule, ops, given)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for module in (reference, chunked):
        original = module.decay_rule

        def spy(*tensors: Tensor, name: str = module.__name__.split(".")[-1], call=original) -> tuple[Tensor, Tensor]:
            used.append(name)
            return call(*tensors)

        monkeypatch.setattr(module, "decay_rule", spy)
    run("decay", ops, arguments("decay", (1, 1, 5, 2, 2)))
    run("decay", ops, arguments("decay", (1, 1, 1, 2, 2)))  # a decoding step
    with ops.use_backend("reference"):
        with ops.use_backend("chunked"):
            run("decay", ops, arguments("decay", (1, 1, 1, 2, 2)))
        run("decay", ops, arguments("decay", (1, 1, 5, 2, 2)))
    assert used == ["chunked", "reference", "chunked", "reference"]


def test_an_unknown_backend() -> None:
    with pytest.raises(AHNError, match="choose from reference, chunked"), ops.use_backend("triton"):
        pass

"""The scan's gradients in kernels against autograd through the recurrences, one token at a time in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MEMORIES, adapted, tokens
from test_scan_kernel import FLOAT32, INTERPRETED, NAMES, expected, several_states
from test_step import DEVICE, RULES
from torch import Tensor

from ahn import ops
from ahn.ops.rule import StepRule

# Of a chunk's products the backward repeats those of the forward and takes products of their results.
BACKWARD = 2
# Decay between two tokens is the exponential of a difference of sums over a chunk, each a scan of 6 additions deep.
SUMS = 2 * 6 * 2**-24
GATES = {"usual": (0.0, 0.25), "forgets": (2.0, 30.0), "keeps": (-2.0, 1e-4), "closed": (-torch.inf, 0.0)}


def inputs(
    name: str, tokens: int, heads: int, kv_heads: int, P: int, dtype: torch.dtype, gates: str = "usual"
) -> dict[str, Tensor | None]:
    """Arguments of a scan for two rows, strided as a model has them; half of all keys nearly repeat."""
    r = torch.Generator().manual_seed(tokens + P)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r)

    opened, forgotten = GATES[gates]
    key = normal(2, kv_heads, tokens + 7, P)
    key[:, :, tokens // 2 :] = key[:, :, :1] + 0.1 * key[:, :, tokens // 2 :]
    return {
        "query": normal(2, tokens, heads, P).to(dtype).transpose(1, 2),
        "key": key.to(dtype)[:, :, 5 : 5 + tokens],
        "value": normal(2, kv_heads, tokens + 7, P).to(dtype)[:, :, 5 : 5 + tokens],
        "write": torch.sigmoid(normal(2, heads, tokens) + opened),
        "decay": -F.softplus(normal(2, heads, tokens)) * forgotten if RULES[name].decay else None,
        "state": 0.3 * normal(2, heads, P, P),
    }


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    arguments: dict[str, Tensor | None],
    rule: StepRule,
    weights: list[Tensor],
) -> dict[str, Tensor]:
    """Read, state, and the gradients of their sum under these weights."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in arguments.items()}
    share = leaves.pop("share", None)
    outputs = function(*leaves.values(), rule, share)
    sum((x * weight.to(x)).sum() for x, weight in zip(outputs, weights, strict=True)).backward()
    gradients = {f"grad_{name}": x.grad for name, x in (leaves | {"share": share}).items() if x is not None}
    return {"o": outputs[0].detach(), "state": outputs[1].detach()} | gradients


def bound(arguments: dict[str, Tensor | None]) -> float:
    """What float32 leaves: rounding of products, and of sums of logarithms, large where much is forgotten."""
    decay = arguments["decay"]
    largest = 0.0 if decay is None else max(float(part.sum(-1).abs().max()) for part in decay.split(64, dim=-1))
    return BACKWARD * FLOAT32 + SUMS * largest


def errors_of(name: str, arguments: dict[str, Tensor | None], read: float = 1.0) -> dict[str, float]:
    """Relative to each tensor's norm, or to 1 where it is smaller: terms that cancel leave their rounding behind."""
    from ahn.ops.scan.gradients import Scan

    rule, r = RULES[name], torch.Generator().manual_seed(1)
    weights = [torch.randn(arguments[name].shape, generator=r) for name in ("query", "state")]
    weights[0] *= read
    exact = {part: None if x is None else x.double() for part, x in arguments.items()}
    wanted = outputs_and_gradients(lambda *x: expected(*x[:-1], None, x[-1]), exact, rule, weights)
    moved = {part: None if x is None else x.to(DEVICE) for part, x in arguments.items()}
    found = outputs_and_gradients(Scan.apply, moved, rule, weights)
    assert all(found[f"grad_{part}"].dtype == x.dtype for part, x in arguments.items() if x is not None)
    return {
        part: relative_error(found[part].double().cpu(), x) * min(1.0, float(x.norm())) for part, x in wanted.items()
    }


@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "P"), [(1, 1, 1, 16), (64, 2, 1, 16), (65, 4, 2, 16), (150, 2, 2, 32)]
)
def test_gradients(name: str, tokens: int, heads: int, kv_heads: int, P: int) -> None:
    arguments = inputs(name, tokens, heads, kv_heads, P, torch.float32)
    errors = errors_of(name, arguments)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize(("kv_heads", "groups", "states"), [(2, 3, 4), (2, 1, 2), (1, 5, 2)])
def test_gradients_of_what_several_states_share(kv_heads: int, groups: int, states: int) -> None:
    arguments = several_states(70, 16, torch.float32, kv_heads, groups, states)  # more than a chunk
    errors = errors_of("deltanet", arguments)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gates", ["forgets", "keeps", "closed"])
def test_gates_at_their_ends(name: str, gates: str) -> None:
    arguments = inputs(name, 130, 2, 1, 16, torch.float32, gates)
    errors = errors_of(name, arguments)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_last_state_alone(name: str) -> None:
    arguments = inputs(name, 70, 2, 1, 16, torch.float32)
    errors = errors_of(name, arguments, read=0.0)
    assert max(errors.values()) < bound(arguments), errors


@pytest.mark.usefixtures("triton")
@pytest.mark.skipif(not INTERPRETED, reason="kernels take no float32 on a GPU; tests/gpu has the same in bfloat16")
@pytest.mark.parametrize("options", [{}, {"router": True, "q_proj": True}], ids=["plain", "options"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_model_learns_the_same(memory: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients of every parameter of memory and base, through kernels and in chunks."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    model = adapted("qwen3", memory=memory, window=6, sinks=2, **options)
    ids, found = tokens(2, 30), []
    for kernels in (False, True):
        monkeypatch.setattr(ops, "scans_whole", lambda query, kernels=kernels: kernels)
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
@settings(max_examples=8, deadline=None)
def test_any_shape(name: str, tokens: int, kv_heads: int, groups: int, gates: str, read: float) -> None:
    arguments = inputs(name, tokens, kv_heads * groups, kv_heads, 16, torch.float32, gates)
    errors = errors_of(name, arguments, read)
    assert max(errors.values()) < bound(arguments), errors

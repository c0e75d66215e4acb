"""The scan's kernels against the recurrences, one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from support.effort import slow
from support.kernels import DEVICE, INTERPRETED, NAMES, RULES, on_device
from support.scans import FLOAT32, expected, several_states

from ahn.ops.rule import StepRead

# Factors in bfloat16 (relative step 2^-8): the state, the inverse, and some products of them in a row.
BFLOAT16 = 8 * 2**-8
FLOAT16 = 8 * 2**-11


@pytest.mark.sample(5)
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "P"), [(1, 1, 1, 16), (64, 2, 1, 16), (65, 4, 2, 16), (150, 2, 2, 32)]
)
def test_the_scan_is_the_recurrence(name: str, tokens: int, heads: int, kv_heads: int, P: int) -> None:
    check(name, tokens, heads, kv_heads, P, torch.float32, FLOAT32)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", NAMES)
def test_the_scan_in_float16(name: str) -> None:
    """In half precision the inverse inside a chunk is worked out in float16; 64 tokens have blocks of every size."""
    check(name, 70, 2, 1, 64, torch.float16, FLOAT16)


@pytest.mark.usefixtures("triton")
def test_rows_without_padding_share_the_router_s_weight() -> None:
    """It depends on how many tokens were written alone, so it has one row for all of them."""
    check("deltanet", 70, 2, 1, 16, torch.float32, FLOAT32, rows=3, weights=1)


@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.sample(1)
@pytest.mark.parametrize(("kv_heads", "groups", "states"), [slow(2, 3, 4), (2, 2, 2), slow(2, 1, 2), (1, 5, 2)])
def test_several_states_of_a_key_head(kv_heads: int, groups: int, states: int) -> None:
    check_states(several_states(70, 16, torch.float32, kv_heads, groups, states), FLOAT32)


def check_states(given: dict[str, torch.Tensor | None], tolerance: float) -> None:
    from ahn.ops.scan import kernel

    rule, query, share = RULES["deltanet"], given["query"], given.pop("share")
    _, heads, _, P = query.shape
    gates = [torch.randn(query.shape[:3]) for _ in range(2)]
    finish = StepRead(query, *gates, 1 + 0.1 * torch.randn(P), torch.randn(heads, P, P).to(query) / P**0.5)
    moved = [None if x is None else x.to(DEVICE) for x in given.values()]
    for read in (None, finish):
        wanted = expected(*given.values(), rule, read, share)
        found = kernel.scan(*moved, rule, on_device(read), share.to(DEVICE))
        for one, other in zip(found, wanted, strict=True):
            assert relative_error(one.double().cpu(), other) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [64, 128])
def test_on_a_gpu_in_bfloat16(name: str, P: int) -> None:
    check(name, 333, 8, 2, P, torch.bfloat16, BFLOAT16)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("P", [64, 128])
@pytest.mark.parametrize("tokens", [36, 333])
def test_several_states_on_a_gpu(P: int, tokens: int) -> None:
    check_states(several_states(tokens, P, torch.bfloat16, groups=4, states=8), BFLOAT16)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [64, 128])
def test_many_heads_on_a_gpu(name: str, P: int) -> None:
    """More programs than fit at once and chunks of every kind: what a compiler has got wrong shows here or nowhere."""
    for tokens in (36, 64, 292, 1024):
        check(name, tokens, 32, 8, P, torch.bfloat16, BFLOAT16, rows=8)


def check(
    name: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    P: int,
    dtype: torch.dtype,
    tolerance: float,
    rows: int = 2,
    weights: int | None = None,
) -> None:
    from ahn.ops.scan import kernel

    rule, r = RULES[name], torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r).to(dtype)

    query = normal(rows, tokens, heads, P).transpose(1, 2)  # strides as the model has them
    key, value = (normal(rows, kv_heads, tokens + 7, P)[:, :, 5 : 5 + tokens] for _ in range(2))
    key[:, :, tokens // 2 :] = key[:, :, :1]  # repeated keys: the system is as hard as it gets
    write = torch.sigmoid(normal(rows, heads, tokens).float())
    decay = -F.softplus(normal(rows, heads, tokens).float()) / 4 if rule.decay else None
    state = 0.1 * normal(rows, heads, P, P).float()
    read = None
    if not rule.across_heads:
        gates = [normal(count, heads, tokens).float() for count in (rows, weights or rows)]
        read = StepRead(query, *gates, 1 + 0.1 * normal(P), normal(heads, P, P) / P**0.5)
    wanted, wanted_state = expected(query, key, value, write, decay, state, rule, read)
    on = [None if x is None else x.to(DEVICE) for x in (query, key, value, write, decay, state)]
    moved = on_device(read)
    found, found_state = kernel.scan(*on, rule, moved)
    assert relative_error(found.float().cpu(), wanted) < tolerance
    assert relative_error(found_state.cpu(), wanted_state) < tolerance

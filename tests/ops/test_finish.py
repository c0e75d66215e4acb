"""Finishing reads in kernels, with gradients, against plain torch in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from support.effort import slow
from support.kernels import DEVICE, NAMES, RULES
from torch import Tensor

from ahn.ops.rule import StepRead, StepRule

FLOAT32 = 1e-5  # sums of up to a few hundred terms, in another order


def plain(o: Tensor, rule: StepRule, read: StepRead) -> Tensor:
    B, H, m, P = o.shape
    gate = F.silu(read.gamma)[..., None]
    if rule.across_heads:
        merged = (o * gate).transpose(1, 2).reshape(B, m, H * P)
        y = F.rms_norm(merged, (H * P,), read.norm, rule.norm_eps).view(B, m, H, P).transpose(1, 2)
    else:
        y = F.rms_norm(o, (P,), read.norm, rule.norm_eps) * gate
    y = y @ read.o_proj
    return y if read.weight is None else y * read.weight[..., None]


def made(rule: StepRule, B: int, heads: int, tokens: int, P: int, router: bool) -> dict[str, Tensor]:
    """Raw reads and what finishes them, strided as the model has them."""
    r = torch.Generator().manual_seed(tokens + heads)
    given = {
        "o": torch.randn(B, tokens, heads, P, generator=r).transpose(1, 2),
        "gamma": 2 * torch.randn(B, tokens, heads, generator=r).transpose(1, 2),
        "norm": 1 + 0.1 * torch.randn(heads * P if rule.across_heads else P, generator=r),
        "o_proj": torch.randn(heads, P, P, generator=r) / P**0.5,
    }
    return given | ({"weight": torch.rand(B, heads, tokens, generator=r)} if router else {})


def output_and_gradients(function, given: dict[str, Tensor], rule: StepRule) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    read = StepRead(leaves["o"], leaves["gamma"], leaves.get("weight"), leaves["norm"], leaves["o_proj"])
    out = function(*([leaves["exact"]] if "exact" in leaves else []), leaves["o"], rule, read)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights.to(out)).sum().backward()
    return {"out": out.detach()} | {f"grad_{name}": x.grad for name, x in leaves.items()}


def check(name: str, given: dict[str, Tensor], tolerance: float, **changes: float) -> None:
    from ahn.ops.scan.finish_kernel import finish

    rule = dataclasses.replace(RULES[name], **changes)
    wanted = output_and_gradients(plain, {part: x.double() for part, x in given.items()}, rule)
    found = output_and_gradients(finish, {part: x.to(DEVICE) for part, x in given.items()}, rule)
    # The norm over all heads takes a lone head's gate out again: of its gradient, rounding is left.
    errors = {
        part: relative_error(found[part].double().cpu(), x) * min(1.0, float(x.norm())) for part, x in wanted.items()
    }
    assert max(errors.values()) < tolerance, errors


@pytest.mark.sample(6)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("B", "heads", "tokens", "P"), [(1, 1, 1, 16), (2, 3, 5, 16), (1, 4, 40, 16), slow(1, 4, 300, 16), (1, 28, 3, 32)]
)
@pytest.mark.parametrize("router", [False, True])
def test_finish(name: str, B: int, heads: int, tokens: int, P: int, router: bool, monkeypatch) -> None:
    monkeypatch.setattr("ahn.ops.scan.finish_kernel.PROGRAMS", 7)  # so that programs take several tokens
    check(name, made(RULES[name], B, heads, tokens, P, router), FLOAT32)


def kernels(exact: Tensor, o: Tensor, rule: StepRule, read: StepRead) -> Tensor:
    from ahn.ops.scan import finish_kernel

    return finish_kernel.AddedRead.apply(exact, o, read.gamma, read.norm, read.o_proj, rule)


@pytest.mark.sample(3)
@pytest.mark.usefixtures("triton", "poisoned")
@pytest.mark.parametrize(("B", "heads", "tokens", "P"), [(1, 1, 1, 16), (2, 3, 65, 16), slow(2, 2, 300, 32)])
@pytest.mark.parametrize("before", [0, 1, 70])
def test_added_to_exact_attention(
    B: int, heads: int, tokens: int, P: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries before the first that reads keep what they have."""
    monkeypatch.setattr("ahn.ops.scan.finish_kernel.PROGRAMS", 2 * heads)  # so that programs take several tiles
    rule = RULES["deltanet"]
    given = made(rule, B, heads, tokens, P, router=False)
    r = torch.Generator().manual_seed(7)
    # As attention functions leave it, or with features that are not side by side.
    shape, dims = ((B, before + tokens, P, heads), (2, 3)) if before == 1 else ((B, heads, before + tokens, P), (1, 2))
    given["exact"] = torch.randn(shape, generator=r).transpose(*dims)
    wanted = output_and_gradients(added(plain), {part: x.double() for part, x in given.items()}, rule)
    found = output_and_gradients(kernels, {part: x.to(DEVICE) for part, x in given.items()}, rule)
    errors = {part: relative_error(found[part].double().cpu(), x) for part, x in wanted.items()}
    assert max(errors.values()) < FLOAT32, errors


@pytest.mark.usefixtures("triton", "poisoned", "bfloat16_products")
def test_added_in_bfloat16() -> None:
    rule = RULES["deltanet"]
    given = made(rule, 1, 2, 65, 16, router=False) | {"exact": torch.randn(1, 70, 2, 16)}
    given |= {name: given[name].bfloat16() for name in ("o", "exact")}
    wanted = output_and_gradients(added(plain), {part: x.double() for part, x in given.items()}, rule)
    found = output_and_gradients(kernels, {part: x.to(DEVICE) for part, x in given.items()}, rule)
    errors = {part: relative_error(found[part].double().cpu(), x) for part, x in wanted.items()}
    assert max(errors.values()) < 4 * 2**-7, errors  # rounded at most four times on the way, by the interpreter to zero


def added(function):
    """What `function` reads, in plain torch in the last tokens of exact attention."""

    def call(exact: Tensor, o: Tensor, rule: StepRule, read: StepRead) -> Tensor:
        before = exact.shape[1] - o.shape[2]
        return exact + F.pad(function(o, rule, read).transpose(1, 2), (0, 0, 0, 0, before, 0))

    return call


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", NAMES)
def test_reads_of_an_empty_state(name: str) -> None:
    """Zeros: the norm's factor is at its largest, and gradients are those of epsilon."""
    given = made(RULES[name], 2, 2, 3, 16, router=False)
    given["o"][:, :, 1] = 0
    check(name, given, FLOAT32, norm_eps=0.01)

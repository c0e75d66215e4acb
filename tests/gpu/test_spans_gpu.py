"""Attention over spans on a GPU: kernels against the plain form in float64, and students that learn with them."""

from __future__ import annotations

import copy

import pytest
import torch
from golden import relative_error
from models import awaken, base, tokens
from support.spans import learned as outcome
from support.spans import made, results, used

import ahn
from ahn import ops
from ahn.attend import spans
from ahn.layout.visibility import FOR_EVER
from ahn.model import route

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Weights, gradients of scores and results are rounded to the input's type on the way, twice in a row in the backward
# pass; relative to the largest, sums are as good as their terms. Float32 sums up to a thousand terms in blocks.
TOLERANCE = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("P", [16, 32, 64, 128])
@pytest.mark.parametrize(("n", "T"), [(1024, 1024), (777, 1000), (65, 700), (1, 130)])
@pytest.mark.parametrize("kind", ["random", "window"])
def test_kernels_are_the_plain_form(dtype: torch.dtype, P: int, n: int, T: int, kind: str) -> None:
    case = made(2, 2, 3, n, T, P, n + P, (kind != "window", True))
    case.scaling = P**-0.5
    if kind == "window":
        case.until = torch.arange(T, dtype=torch.int32).expand(1, 1, -1) - (T - n) + 300
        case.until[..., :40] = FOR_EVER
    case = case.cast(dtype).to("cuda")
    found, wanted = results(spans.attend, case), results(spans.plain, case.map(torch.Tensor.double))
    # A query that sees one key has gradients of nothing but rounding: errors count relative to values too.
    floor = wanted["value"].norm().item() if n == 1 else 0.0
    for name, x in wanted.items():
        error = (found[name].double() - x).norm().item()
        assert error <= TOLERANCE[dtype] * max(x.norm().item(), floor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_student_learns_what_it_learns_with_a_mask(
    dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = base(hidden_size=256, head_dim=64, initializer_range=0.08).to(dtype)
    model = awaken(ahn.attach(plain, ahn.AHNConfig(window=150, sinks=10)))
    ids = tokens(2, 700)
    with ops.use_backend("chunked"):
        exact = outcome(copy.deepcopy(model).float(), ids, None, checkpointing=False)
        model, ids = model.cuda(), ids.cuda()
        errors = {}
        for name in ("mask", "spans", "spans, checkpointing"):
            with (
                monkeypatch.context() as patch,
                used() as calls,
                torch.autocast("cuda", torch.bfloat16, enabled=autocast),
            ):
                if name == "mask":
                    patch.setattr(route, "_spans_apply", lambda view, query, kwargs: False)
                found = outcome(model, ids, None, "checkpointing" in name)
            layers = model.config.num_hidden_layers
            assert calls == [{"mask": 0, "spans": layers}.get(name, 2 * layers)]
            errors[name] = {part: relative_error(found[part].float().cpu(), x) for part, x in exact.items()}
    worst = {name: max(found.values()) for name, found in errors.items()}
    assert worst["spans, checkpointing"] == worst["spans"], "recomputed with other bits"
    # As near to float32 on the CPU as the mask is; two runs of rounding errors may differ by chance.
    assert worst["spans"] < 1.5 * worst["mask"] + 1e-5, errors


def test_a_window_costs_no_mask() -> None:
    """A boolean mask of this length would take a gigabyte."""
    L = 32768
    query, key, value = (torch.randn(1, h, L, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    query.requires_grad_()
    until = (torch.arange(L, device="cuda", dtype=torch.int32) + 500)[None, None]
    spans.attend(query, key, value, until, 0.125).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spans.attend(query, key, value, until, 0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 12 * query.nbytes

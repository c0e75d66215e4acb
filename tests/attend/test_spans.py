"""Attention over spans: the kernels against the plain form, and the plain form against torch's attention and masks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden import relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import adapted, awaken, base, tokens
from support.effort import examples, slow
from support.kernels import DEVICE, INTERPRETED
from support.spans import Case, kernels, learned, made, results, used
from torch import Tensor

import ahn
from ahn import AHNError
from ahn.attend import spans, spans_blocks
from ahn.attend.spans_blocks import Columns
from ahn.layout.visibility import FOR_EVER, Visibility

UNIT = 2**-24  # relative error of one rounding to float32


def rounding(case: Case) -> dict[str, float]:
    """How far results may be off: scores are float32, weights and their gradients are rounded to the input's type.

    An error of a score is a relative error of its weight. Weights of a query sum to 1, gradients of its scores to at
    most twice the largest g·v, so that a query's results are off by that much of the largest value or key. Those of a
    key sum over its readers, whose roundings are independent.
    """
    exact = case.map(Tensor.double)
    Hkv, groups = case.key.shape[1], case.query.shape[1] // case.key.shape[1]
    query, gradient = (x.unflatten(1, (Hkv, groups)) for x in (exact.query, exact.gradient))
    score = case.scaling * (query @ exact.key.mT[:, :, None]).abs().max().item()
    rounded = torch.finfo(case.query.dtype).eps + 8 * UNIT * (1 + score)
    ds = 2 * (gradient @ exact.value.mT[:, :, None]).abs().max().item() * rounded
    q, k, v, g = (x.abs().max().item() for x in (exact.query, exact.key, exact.value, exact.gradient))
    many = 1 + (case.query.shape[2] * groups) ** 0.5
    bounds = {"out": v * rounded, "query": case.scaling * k * ds, "key": case.scaling * q * ds * many}
    return bounds | {"value": g * rounded * many}


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], bounds: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        error = (found[name].cpu().double() - x.double()).abs().max().item()
        assert error <= bounds[name], (name, error, bounds[name])  # of NaN, never


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Memory that nobody has written yet is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("triton", "_poisoned")
@given(data=st.data())
@settings(max_examples=examples(2, 8) if INTERPRETED else 60, phases=[Phase.generate])  # shrinking takes minutes
def test_kernels_are_the_plain_form(data: st.DataObject) -> None:
    B, Hkv, groups = (data.draw(st.integers(1, most)) for most in (2, 2, 3))
    n = data.draw(st.integers(1, 100))
    T = n + data.draw(st.sampled_from([0, 0, 1, 37]))
    P = data.draw(st.sampled_from([16, 32, 64]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float16]))
    wide = data.draw(st.booleans()), data.draw(st.booleans())
    case = made(B, Hkv, groups, n, T, P, data.draw(st.integers(0, 99)), wide).cast(dtype)
    wanted = results(spans.plain, case.map(Tensor.double))
    found = results(kernels, case.to(DEVICE))
    compare(found, wanted, rounding(case))


@pytest.mark.usefixtures("triton", "_poisoned")
@pytest.mark.sample(2)
@pytest.mark.parametrize(("n", "T"), [(128, 128), (96, 160), (130, 131)])
def test_kernels_with_a_window(n: int, T: int) -> None:
    """Most blocks need no mask here."""
    case = made(1, 1, 2, n, T, 16, n, (False, False))
    ends = torch.arange(T, dtype=torch.int32)[None, None] - (T - n) + 70
    ends[..., :40] = FOR_EVER
    case = dataclasses.replace(case, until=ends)
    wanted = results(spans.plain, case.map(Tensor.double))
    compare(results(kernels, case.to(DEVICE)), wanted, rounding(case))


@pytest.mark.usefixtures("triton", "_poisoned")
@pytest.mark.parametrize(("held", "n", "width"), [(0, 40, 9), (50, 33, 41)])
def test_parts_say_their_sum(held: int, n: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A band, of which nobody sees the first columns, and the kernels' part of it with its log-sum-exp."""
    case = made(2, 2, 2, n, held + n, 16, n, (False, False)).to(DEVICE)
    columns = Columns.of_band(held, n, width, case.query.device)
    columns.until[..., : held + 5] = 0
    i, j = torch.arange(n)[:, None] + held, torch.arange(held + n)
    expected = ((j <= i) & (j > i - width) & (j >= held + 5)).to(DEVICE)
    assert torch.equal(spans.visible(columns.until, n)[0, 0], expected)
    wanted = spans.part(case.query, case.key, case.value, columns, case.scaling)
    grouped = case.query.unflatten(1, (2, 2)) @ case.key.mT[:, :, None] * case.scaling
    score = grouped.masked_fill(~expected, -torch.inf).logsumexp(-1).flatten(1, 2)
    torch.testing.assert_close(wanted.score, score, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(spans, "supported", lambda query: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for _ in range(2):  # the second time with the lists of the first
        found = spans.part(case.query, case.key, case.value, columns, case.scaling)
        torch.testing.assert_close(found.out, wanted.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.score, wanted.score, rtol=1e-5, atol=1e-5)
    assert (found.score[:, :, :5] == -torch.inf).all() and len(columns._lists) == 1


@pytest.mark.usefixtures("triton", "_poisoned")
@pytest.mark.parametrize("attend", ["plain", "kernels"])
def test_who_sees_nothing_reads_zero(attend: str) -> None:
    case = made(1, 1, 2, 50, 60, 16, 0, (False, False))
    case = dataclasses.replace(case, until=torch.full((1, 1, 60), 7, dtype=torch.int32)).to(DEVICE)
    found = results(spans.plain if attend == "plain" else kernels, case)
    assert (found["out"][:, :, 7:] == 0).all() and (found["query"][:, :, 7:] == 0).all()
    assert (found["key"][:, :, 17:] == 0).all() and (found["value"][:, :, 17:] == 0).all()
    assert all(x.isfinite().all() for x in found.values()) and found["out"][:, :, :7].any()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("part", [True, False], ids=["used", "unused"])
def test_gradients_of_a_part_beside_the_whole(part: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a memory takes of queries and keys, with attention by kernels over all of them, in layers that are alike."""
    asked, blocks = [], spans_blocks.blocks
    monkeypatch.setattr(spans_blocks, "blocks", lambda *given: asked.append(given) or blocks(*given))
    case = made(1, 2, 2, 40, 50, 16, 3, (False, False)).to(DEVICE)
    columns = Columns(case.until, 40)
    found = []
    for apart in (False, True):
        leaves = [getattr(case, name).detach().requires_grad_() for name in ("query", "key", "value")]
        pairs = [(x, x[:, :, 7:20]) if apart else spans.WithPart.apply(x, 7, 20) for x in leaves]
        out = spans.Spans.apply(*(whole for whole, _ in pairs), columns, case.scaling)
        extra = sum((x.sin() * x).sum() for _, x in pairs) if part else 0
        found.append(torch.autograd.grad((out * case.gradient).sum() + extra, leaves))
    assert all(map(torch.equal, *found))
    kinds = {(tile, by_key) for _, _, tile, by_key in asked}
    assert len(asked) == len(kinds), "the second layer made lists of blocks anew"


@pytest.mark.usefixtures("triton")
def test_the_same_bits_each_time_and_only_what_is_wanted() -> None:
    case = made(1, 1, 2, 40, 50, 16, 3, (True, True)).to(DEVICE)
    once, twice = results(kernels, case), results(kernels, case)
    assert all(torch.equal(x, twice[name]) for name, x in once.items())
    for name in ("query", "key", "value"):
        inputs = {part: getattr(case, part) for part in ("query", "key", "value")}
        inputs[name] = inputs[name].detach().requires_grad_()
        out = kernels(*inputs.values(), case.until, case.scaling)
        (alone,) = torch.autograd.grad(out, inputs[name], case.gradient)
        assert torch.equal(alone, once[name])


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.skipif(not INTERPRETED, reason="tests/gpu has this for a GPU")
@pytest.mark.parametrize(
    ("right_padded", "checkpointing"), [(False, True), (True, False), slow(False, False), slow(True, True)]
)
def test_a_student_learns_what_it_learns_with_a_mask(
    right_padded: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(window=14, sinks=3)
    ids, mask = tokens(2, 40), None
    if right_padded:
        mask = torch.ones_like(ids)
        mask[1, 31:] = 0
    wanted = learned(model, ids, mask, checkpointing=False)
    monkeypatch.setattr(spans, "supported", lambda query: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with used() as calls:
        found = learned(model, ids, mask, checkpointing)
    layers = model.config.num_hidden_layers
    assert calls == [2 * layers if checkpointing else layers]
    errors = {name: relative_error(found[name], x) for name, x in wanted.items()}
    # Sums of up to forty terms in another order, some ten of them in a row.
    assert found.keys() == wanted.keys() and max(errors.values()) < 2e-5, errors
    with used() as calls:  # nothing leaves the window
        learned(model, ids[:, :17], None, checkpointing=False)
    assert calls == [0]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("changes", [{"memory": "ct_max"}, {"attn_implementation": "eager"}, {"dropout": 0.5}])
def test_who_keeps_the_mask(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(window=14, sinks=3, **{k: v for k, v in changes.items() if k == "memory"})
    if "dropout" in changes:
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = changes["dropout"]
    if "attn_implementation" in changes:
        model = awaken(ahn.attach(base(attn_implementation="eager"), ahn.AHNConfig(window=14, sinks=3)))
    monkeypatch.setattr(spans, "supported", lambda query: True)
    with used() as calls:
        learned(model, tokens(1, 40), None, checkpointing=False)
    assert calls == [0]


@given(st.data())
@settings(max_examples=60)
def test_until_is_the_mask(data: st.DataObject) -> None:
    window, sinks = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 5))
    view = Visibility(window, sinks, data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40)), torch.device("cpu"))
    assert view.until.shape == (1, 1, view.cached + view.length) and view.until.dtype == torch.int32
    assert torch.equal(spans.visible(view.until, view.length), view.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_plain_form_is_torchs_attention(dtype: torch.dtype) -> None:
    view = Visibility(9, 3, 0, 40, torch.device("cpu"))
    case = made(2, 2, 2, 40, 40, 16, 1, (False, False)).map(lambda x: x.to(dtype))
    found = spans.attend(case.query, case.key, case.value, view.until, case.scaling)
    exact = case.map(Tensor.double)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        exact.query, exact.key, exact.value, view.mask, scale=case.scaling, enable_gqa=True
    )
    assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=100 * UNIT)


def test_bad_input_is_refused() -> None:
    case = made(1, 2, 2, 8, 8, 16, 0, (False, False))

    def attend(**changes: object) -> Tensor:
        given = vars(case) | changes
        return spans.attend(*(given[name] for name in list(given)[:5]))

    attend()
    bad: list[dict[str, object]] = [
        {"key": case.key[:, :, :5]},
        {"value": case.value.double()},
        {"scaling": 0.0},
        {"until": case.until.to("meta")},
        {"until": case.until.long()},
        {"until": case.until[..., :5]},
        {"until": case.until[0]},
    ]
    for changes in bad:
        with pytest.raises(AHNError):
            attend(**changes)

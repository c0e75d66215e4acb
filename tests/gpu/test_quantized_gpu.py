"""Quantized tokens on a GPU: the kernels over both windows, positions, codes as on a CPU, captured steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from codes import TWO_BITS, rounded_otherwise
from golden import relative_error
from models import adapted, awaken, base, give_bases, tokens
from support.turns import read
from talk import Talk
from transformers import PreTrainedModel

import ahn
from ahn.attend import windowed
from ahn.cache import tier
from ahn.decode import runner
from ahn.layout.evicted import Evicted
from ahn.layout.state import TierRing, TierState
from ahn.layout.tier import TierView
from ahn.layout.visibility import Visibility
from ahn.ops.quantize import decode, decode_rotated, encode, rotate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BFLOAT16 = 2**-7  # outputs of parts are rounded twice on their way into the merged one


@pytest.mark.parametrize(("held", "n"), [(0, 64), (40, 200), (96, 33), (96, 300)])
@torch.no_grad()
def test_bands_with_a_tier_are_the_mask(held: int, n: int) -> None:
    window, sinks, quantized = 64, 4, 96
    view = Visibility(window, sinks, sinks + window + held, n, torch.device("cuda"), quantized=quantized)
    query, *rest = (
        torch.randn(2, heads, length, 64, device="cuda", dtype=torch.bfloat16)
        for heads, length in ((4, n), *[(2, view.cached + n)] * 2, *[(2, held + n)] * 2)
    )
    assert windowed.applies(view, query)
    t, j = torch.arange(n, device="cuda")[:, None] + held, torch.arange(held + n, device="cuda")
    mask = torch.cat([view.mask[0, 0], (j <= t) & (j > t - quantized)], dim=-1)
    key, value = torch.cat(rest[::2], 2).float(), torch.cat(rest[1::2], 2).float()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key, value, mask, scale=0.3, enable_gqa=True
    )
    found = windowed.attend(query, rest[0], rest[1], view, 0.3, [windowed.Band(query, rest[2], rest[3], quantized)])
    assert relative_error(found.cpu(), expected.cpu()) < BFLOAT16


def test_a_single_query_sees_what_the_codes_decode_to() -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 64, device="cuda", dtype=torch.bfloat16)

    query, exact = normal(2, 4, 1), [normal(2, 2, 68) for _ in range(2)]
    offsets = [normal(2, 2).float() for _ in range(2)]
    encoded = [encode(normal(2, 2, 300), unbiased) for unbiased in (True, False)]
    keys, values = (decode(*x, torch.float32) + at.unsqueeze(2) for x, at in zip(encoded, offsets, strict=True))
    ring, other = (TierRing(*x, at) for x, at in zip(encoded, offsets, strict=True))
    state = TierState(ring, other)
    unread = Evicted(keys[:, :, :0], values[:, :, :0], {})
    view = Visibility(64, 4, 400, 1, torch.device("cuda"), quantized=300)
    raw = tier.Seen(*(decode_rotated(*x, torch.bfloat16) for x in encoded))
    passed = tier.Passed(raw, None, state, unread, TierView(view), raw=True)
    key, value = (torch.cat([a.float(), b], 2) for a, b in zip(exact, (keys, values), strict=True))
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), key, value, scale=0.125, enable_gqa=True)
    found = tier.attend(query, exact[0], exact[1], passed, 0.125)
    assert relative_error(found.cpu(), expected.cpu()) < 2 * BFLOAT16  # codes times scales are rounded as well


@pytest.mark.parametrize("memory", ["gated_deltanet", "window_only"])
def test_codes_that_lose_nothing_are_a_wider_window(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 70).cuda()
    model = adapted(memory=memory, window=9, sinks=2, quantized=12).cuda()
    with ahn.ops.use_backend("chunked"):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "on_gpu", lambda ids: False)  # what is replaced here is the ordinary step's
            patch.setattr("ahn.cache.tier.encode", lambda x, unbiased, bits: (x, x[..., 0]))
            patch.setattr("ahn.cache.tier.decode", lambda codes, scale, dtype, bits: codes)
            patch.setattr("ahn.cache.tier.decode_rotated", lambda codes, scale, dtype, bits: rotate(codes))
            found = read(model, ids, [5, 20, 1, 1, 30, *[1] * 13], ahn.AHNCache.for_model(model))
        ahn.set_window(model, 21, 2, quantized=0)
        expected = read(model, ids, [70], ahn.AHNCache.for_model(model))
    assert relative_error(found.cpu(), expected.cpu()) < 1e-4


@torch.no_grad()
def test_codes_are_a_cpus() -> None:
    x = torch.randn(2, 3, 50, 128)
    for unbiased in (True, False):
        here, there = encode(x, unbiased), encode(x.cuda(), unbiased)
        assert (here[0] == there[0].cpu()).float().mean() > 0.999  # a number on an edge may fall to either side
        assert relative_error(decode(*there, torch.float32).cpu(), decode(*here, torch.float32)) < 0.01


def awake(architecture: str, memory: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    config = ahn.AHNConfig(memory=memory, window=40, sinks=4, prefill_chunk_size=64, **options)
    # Heads of 64: more than one word of codes in each vector.
    plain = base(architecture, hidden_size=256, head_dim=64)
    model = awaken(ahn.attach(plain.to(dtype), config))
    if config.calibrated_keys:
        give_bases(model)
    return model.cuda()


CALIBRATED = {"calibrated_keys": True, "key_bits": 2, "value_bits": 4}
FORMS: dict[str, dict[str, Any]] = {
    "two bits after RoPE": TWO_BITS,
    "default, any distance": {"max_distance": 0},
    "default, bounded": {"max_distance": 256},  # reach 88: of the 96 tokens 49 are seen at their own distance
    "3/2, bounded": {"max_distance": 256, "key_bits": 3},
    "4/4, bounded": {"max_distance": 256, "value_bits": 4},
    "2/2, bounded": {"max_distance": 256, "key_bits": 2},
    "4/2 after RoPE": {"keys_before_rope": False},
    "calibrated, any distance": CALIBRATED | {"max_distance": 0},
    "calibrated, bounded": CALIBRATED | {"max_distance": 256},
    "calibrated 2/3, bounded": CALIBRATED | {"max_distance": 256, "value_bits": 3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("memory", ["window_only", "deltanet", "gated_deltanet", "routed_deltanet"])
@torch.no_grad()
def test_captured_steps_are_ordinary_ones(
    architecture: str, memory: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the edge of the window and of the codes, in a padded batch, until both rings have gone round; float32.

    A step that has rounded a code or a scale to the other side is excused, and both ways go on from the same cache.
    """
    model = awake(architecture, memory, torch.float32, quantized=96, **FORMS[form])
    talks, excused, errors = [Talk(model, 2), Talk(model, 2)], 0, []
    with ahn.ops.use_backend("chunked"):
        for step in range(341):
            for talk, captured in zip(talks, (True, False), strict=True):
                with monkeypatch.context() as patch:
                    if not captured:
                        patch.setattr(runner, "on_gpu", lambda ids: False)
                    talk.read((1, 1) if step else (30, 17))
            if rounded_otherwise(*talks):
                excused += 1
                talks[1].cache = copy.deepcopy(talks[0].cache)
                continue
            found, expected = (torch.cat([row[-1] for row in talk._logits]) for talk in talks)
            errors.append(relative_error(found, expected))
            # Float32 in another order of operations, through two layers with sharp attention: against float64, from
            # the same cache, an ordinary step is up to 1.4e-5 off with calibrated keys, 6e-6 without.
            assert errors[-1] < 1e-4, step
    assert torch.tensor(errors).median() < 2e-5
    assert talks[0].cache.captured is not None and talks[1].cache.captured is None
    # 16 scales a step, each within an error of 1e-5 of the edge of its 2^-8 wide place: 14 of 341 steps. Of four bits
    # eight times as many edges are within the same error of a number, which are few beside the scales'.
    assert excused <= (20 if form == "two bits after RoPE" else 40)


@pytest.mark.parametrize(
    "form",
    [TWO_BITS, {"max_distance": 0}, {"max_distance": 512}, CALIBRATED, CALIBRATED | {"max_distance": 512}],
)  # the third and the last have seven far tokens
@torch.no_grad()
def test_bfloat16_steps_are_as_near_to_float32_as_ordinary_ones(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = awake("qwen3", "gated_deltanet", torch.bfloat16, quantized=96, **form)
    reference, errors = copy.deepcopy(model).float(), []
    for captured in (True, False):
        with monkeypatch.context() as patch:
            if not captured:
                patch.setattr(runner, "on_gpu", lambda ids: False)
            talk = Talk(model, 2)
            talk.read((30, 17))
            talk.steps(300)
        errors.append(talk.error(reference))
    # Both round as often, at other places; codes of rounded numbers differ from the reference's in either.
    assert errors[0] < 1.5 * errors[1], errors


@torch.no_grad()
def test_half_precision_generates() -> None:
    """Through the kernels of chunks, in the form that new configurations have."""
    model = awake("qwen3", "gated_deltanet", torch.bfloat16, quantized=64, max_distance=176)
    assert model.ahn_config.tier_reach == 88  # of the 64 tokens of the tier, 15 are farther
    output = model.generate(tokens(1, 300).cuda(), max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert output.past_key_values.captured is not None
    assert output.sequences.shape == (1, 340)
    tier_state = output.past_key_values.memory_layers[0].state.tier
    assert tier_state.keys.codes.shape == (1, 2, 64, 32) and tier_state.values.codes.shape == (1, 2, 64, 16)

"""Quantized tokens between window and memory: against a full-sequence form, cut in any way, padded, saved and moved.

In two forms: two bits of keys after RoPE, which files from before mean, and keys before RoPE, of which those that are
far are all seen at one distance.

Codes jump where a number lies on the edge of two levels, and float32 in another order of operations can carry it over.
The models here compute in float64 and the examples do not change from run to run, so that no test meets such a number.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, EVERYTHING, adapted, base, tokens
from support.effort import examples
from support.turns import Turns, assert_rows_alone, assert_same_layers, padded, pieces, read, turns
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import ahn
from ahn.attend import windowed
from ahn.cache import tier
from ahn.layout.evicted import Evicted
from ahn.layout.state import TierRing, TierState
from ahn.layout.tier import TierView
from ahn.layout.visibility import Visibility
from ahn.ops.quantize import LEVELS, decode, decode_rotated, encode, rotate
from ahn.training.distillation import distillation_loss

TOLERANCE = 1e-4  # memories compute in float32
MEMORIES = ("gated_deltanet", "mamba2", "window_only", "ct_avg")


@cache
def shared(memory: str = "gated_deltanet", architecture: str = "qwen3") -> PreTrainedModel:
    options = memory in ahn.memory.names()
    model = adapted(architecture, memory=memory, router=options, q_proj=options)
    return model if architecture == "gpt_oss" else model.double()  # its experts have no float64


class Near(ahn.AHNConfig):
    """Tokens of the tier are seen at their own distance for a few tokens only, which a base of 4 096 never wants."""

    @property
    def tier_reach(self) -> int:
        return self.lossless + 4 if self.keys_before_rope else 0


AFTER, BEFORE = (2, 2, False), (4, 2, True)
"""Bits of keys and values, and whether keys are kept before RoPE."""
FORMS = (AFTER, BEFORE, (3, 3, True))


def with_tier(
    model: PreTrainedModel,
    window: int,
    sinks: int,
    quantized: int,
    chunk: int = 10_000,
    form: tuple[int, int, bool] = BEFORE,
) -> PreTrainedModel:
    turned = form[2] and model._ahn.rotation is not None
    fields = {"quantized": quantized, "key_bits": form[0], "value_bits": form[1], "keys_before_rope": turned}
    distance = 4096 if model._ahn.rotation is not None else 0
    sizes = {"window": window, "sinks": sinks, "prefill_chunk_size": chunk, "max_distance": distance}
    model.ahn_config = Near(**vars(model.ahn_config) | fields | sizes)
    return model


# -- a plain form: all keys of a text at once, masks, no cache ---------------------------------------------------------

PLAIN: dict[str, Any] = {}


def quantize(x: Tensor, unbiased: bool, sinks: int, window: int, bits: int) -> Tensor:
    """x (B, Hkv, L, P) as its codes say it, the mean of positions S to S + W taken out first."""
    mean = x[:, :, sinks : sinks + window].mean(2, keepdim=True).nan_to_num()  # nothing left if there are none
    size = x.shape[-1] & -x.shape[-1]
    hadamard = torch.ones(1, 1, dtype=x.dtype)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / 2**0.5
    rotation = torch.block_diag(*[hadamard] * (x.shape[-1] // size))
    y = (x - mean) @ rotation
    levels = torch.tensor(LEVELS[bits], dtype=x.dtype)
    z = y / y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    level = levels[(z[..., None] - levels).abs().argmin(-1)]
    inner = (y * level).sum(-1, keepdim=True)
    scale = (
        y.square().sum(-1, keepdim=True) / inner.clamp_min(1e-30)
        if unbiased
        else inner / level.square().sum(-1, keepdim=True)
    )
    return (level * scale.bfloat16()) @ rotation + mean


def turn(x: Tensor, by: Tensor) -> Tensor:
    """RoPE as its paper has it (arXiv 2104.09864), in Llama's order of pairs: x (..., P) turned by positions (...)."""
    half = x.shape[-1] // 2
    angle = by[..., None] * PLAIN["theta"] ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def plain_attention(module, query, key, value, mask, scaling=None, **kwargs):
    config = PLAIN["config"]
    W, S, C = config.window, config.sinks, config.quantized
    groups, L = query.shape[1] // key.shape[1], query.shape[2]
    t, j = torch.arange(L)[:, None], torch.arange(L)
    exact = (j <= t) & ((j < S) | (j > t - W))
    tier = (j >= S) & (j <= t - W) & (j > t - W - C)
    scores = [query @ key.repeat_interleave(groups, 1).mT * scaling]
    if config.keys_before_rope:  # every pair at its distance, one by one
        coded = quantize(turn(key, -j), True, S, W, config.key_bits).repeat_interleave(groups, 1)
        distance = (t - j).clamp(0, config.tier_reach or L)
        there = turn(turn(query, -j)[:, :, :, None], distance)  # (B, Hq, L, L, P)
        scores.append((there * coded[:, :, None]).sum(-1) * scaling)
    else:
        scores.append(query @ quantize(key, True, S, W, config.key_bits).repeat_interleave(groups, 1).mT * scaling)
    scores = [x.masked_fill(~seen, -torch.inf) for x, seen in zip(scores, (exact, tier), strict=True)]
    values = torch.cat([value, quantize(value, False, S, W, config.value_bits)], 2).repeat_interleave(groups, 1)
    return (torch.cat(scores, -1).softmax(-1) @ values).transpose(1, 2), None


AttentionInterface.register("plain_quantized", plain_attention)
AttentionMaskInterface.register("plain_quantized", lambda **kwargs: None)


@torch.no_grad()
def plain(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of an adapted model without a memory, by the plain form."""
    PLAIN.update(config=model.ahn_config, theta=model.config.rope_parameters["rope_theta"])
    own = model._ahn.kernel
    with ahn.disabled(model):
        model.set_attn_implementation("plain_quantized")
        try:
            return model(ids, use_cache=False).logits
        finally:
            model.set_attn_implementation(own)


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])  # qwen2: key biases, head dimension 8
@pytest.mark.parametrize("form", FORMS)
@given(window=st.integers(1, 12), sinks=st.integers(0, 4), quantized=st.integers(1, 20), length=st.integers(1, 50))
@settings(max_examples=examples(4, 8), derandomize=True)
@example(window=5, sinks=2, quantized=20, length=50)
def test_it_is_the_plain_form(
    architecture: str, form: tuple[int, int, bool], window: int, sinks: int, quantized: int, length: int
) -> None:
    model, ids = with_tier(shared("window_only", architecture), window, sinks, quantized, form=form), tokens(2, length)
    expected = plain(model, ids)
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected) < TOLERANCE
        assert relative_error(model(ids, use_cache=False).logits, expected) < TOLERANCE


@pytest.mark.sample(4)
@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
@pytest.mark.parametrize("form", [AFTER, BEFORE])
def test_what_a_query_sees_at_the_edges(form: tuple[int, int, bool], beyond: int) -> None:
    """S + W + C tokens and a few more or less: with one the memory has the first token, not before."""
    window, sinks, quantized = 6, 2, 9
    ids = tokens(1, window + sinks + quantized + beyond)
    logits = {}
    for memory in ("window_only", "gated_deltanet"):
        model = with_tier(shared(memory), window, sinks, quantized, form=form)
        held = ahn.AHNCache.for_model(model)
        logits[memory] = read(model, ids, [ids.shape[1]], held)
        stepped = ahn.AHNCache.for_model(model)
        assert relative_error(read(model, ids, [1] * ids.shape[1], stepped), logits[memory]) < TOLERANCE
        assert relative_error(logits["window_only"], plain(model, ids)) < TOLERANCE
    written = held.memory_layers[0].state.memory["state"]
    assert bool(written.any()) == (beyond > 0)
    # The base weights are the same, so until something is written both memories give the same.
    same = slice(0, window + sinks + quantized)
    assert relative_error(logits["gated_deltanet"][:, same], logits["window_only"][:, same]) < 1e-12
    if beyond > 0:
        change = relative_error(logits["gated_deltanet"][:, -1], logits["window_only"][:, -1])
        assert change > 1e-3


@torch.no_grad()
def test_codes_win_back_what_the_window_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On random weights too: two bits of a token are nearer to the token than nothing, and more bits nearer."""
    monkeypatch.setattr(Near, "tier_reach", 0)
    model, ids = shared("window_only"), tokens(2, 60)
    with ahn.disabled(model):
        full = model(ids).logits
    errors = [relative_error(model(ids).logits, full) for _ in [with_tier(model, 8, 2, 0)]]
    for form in (AFTER, BEFORE, (4, 4, True)):
        errors.append(relative_error(with_tier(model, 8, 2, 50, form=form)(ids).logits, full))
    assert errors[1] < 0.5 * errors[0]
    assert errors[3] < errors[2] < errors[1]


@given(data=st.data())
@settings(max_examples=60)
def test_bands_with_a_tier_are_the_mask(data: st.DataObject) -> None:
    window, sinks, quantized = (data.draw(st.integers(*range_)) for range_ in ((3, 12), (0, 3), (3, 15)))
    seen, n = sinks + window + data.draw(st.integers(0, 20)), data.draw(st.integers(2, 40))
    view = Visibility(window, sinks, seen, n, torch.device("cpu"), quantized=quantized)
    held = min(seen - sinks - window, quantized)
    query = torch.randn(1, 4, n, 8)
    exact = [torch.randn(1, 2, view.cached + n, 8) for _ in range(2)]
    coarse = [torch.randn(1, 2, held + n, 8) for _ in range(2)]
    t = torch.arange(n)[:, None] + held  # which of the coarse keys leaves the window for a query
    j = torch.arange(held + n)
    mask = torch.cat([view.mask[0, 0], (j <= t) & (j > t - quantized)], dim=-1)
    key, value = (torch.cat(pair, dim=2) for pair in zip(exact, coarse, strict=True))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    with torch.no_grad():
        band = windowed.Band(query, coarse[0], coarse[1], quantized)
        found = windowed.attend(query, exact[0], exact[1], view, 0.3, [band])
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [8, 12, 64])
def test_a_single_query_sees_what_the_codes_decode_to(head_dim: int) -> None:
    query, exact = torch.randn(2, 4, 1, head_dim), [torch.randn(2, 2, 9, head_dim) for _ in range(2)]
    offsets = [3 * torch.randn(2, 2, head_dim) for _ in range(2)]
    encoded = [encode(torch.randn(2, 2, 21, head_dim), unbiased) for unbiased in (True, False)]
    keys, values = (decode(*x, torch.float32) + at.unsqueeze(2) for x, at in zip(encoded, offsets, strict=True))
    state = TierState(*(TierRing(*x, at) for x, at in zip(encoded, offsets, strict=True)))
    unread = Evicted(keys[:, :, :0], values[:, :, :0], {})
    view = Visibility(3, 2, 30, 1, torch.device("cpu"), quantized=21)
    raw = tier.Seen(*(decode_rotated(*x, torch.float32) for x in encoded))
    passed = tier.Passed(raw, None, state, unread, TierView(view), raw=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, torch.cat([exact[0], keys], 2), torch.cat([exact[1], values], 2), scale=0.3, enable_gqa=True
    )
    found = tier.attend(query, exact[0], exact[1], passed, 0.3)
    assert relative_error(found, expected) < 1e-5  # float32: one more rotation each way, sums of 30 terms


@torch.no_grad()
@pytest.mark.parametrize(("form", "quantized"), [(AFTER, 7), (BEFORE, 7), (BEFORE, 15)])  # N = 7: all near, and not
def test_bands_read_later_chunks(form: tuple[int, int, bool], quantized: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask of queries times keys: chunks after a full window, and single tokens, go through the fast kernels."""
    model, ids = with_tier(shared("gated_deltanet"), 9, 2, quantized, form=form), tokens(2, 60)
    cache = ahn.AHNCache.for_model(model)
    read(model, ids[:, :11], [11], cache)

    def refused(*arguments: object) -> None:
        raise AssertionError("a dense mask")

    monkeypatch.setattr("ahn.model.more_keys.with_more_keys", refused)
    read(model, ids[:, 11:], [4, 17, 1, 1, 15], cache)
    with pytest.raises(AssertionError, match="a dense mask"):  # a tier that one step would not fill
        fresh = ahn.AHNCache.for_model(model)
        read(model, ids, [11, 1], fresh)


# -- however it is cut and padded --------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("memory", "form"),
    [*((memory, BEFORE) for memory in MEMORIES), ("gated_deltanet", AFTER), ("ct_avg", (3, 3, True))],
)
@given(
    window=st.integers(1, 12),
    sinks=st.integers(0, 5),
    quantized=st.integers(1, 20),
    pieces=pieces,
    chunk=st.integers(1, 9),
)
@settings(max_examples=examples(1, 8), derandomize=True)
@example(window=7, sinks=3, quantized=9, pieces=[1] * 25, chunk=1)
@example(window=5, sinks=2, quantized=4, pieces=[8, 1, 1, 1, 9, 1, 1, 4, 1], chunk=3)
@example(window=4, sinks=0, quantized=1, pieces=[20, 1, 1, 12, 1], chunk=5)
def test_whole_is_chunks_is_steps(
    memory: str, form: tuple[int, int, bool], window: int, sinks: int, quantized: int, pieces: list[int], chunk: int
) -> None:
    model = with_tier(shared(memory), window, sinks, quantized, form=form)
    ids = tokens(2, sum(pieces))
    whole, found = (ahn.AHNCache.for_model(model) for _ in range(2))
    expected = read(model, ids, [ids.shape[1]], whole)
    with torch.no_grad():
        assert relative_error(model(ids, use_cache=False).logits, expected) < TOLERANCE
    assert relative_error(read(model, ids, pieces, found), expected) < TOLERANCE
    assert_same_layers(found, whole)
    own_chunks = ahn.AHNCache.for_model(with_tier(model, window, sinks, quantized, chunk, form))
    assert relative_error(read(model, ids, [ids.shape[1]], own_chunks), expected) < TOLERANCE
    assert_same_layers(own_chunks, whole)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("memory", "form"), [*((memory, BEFORE) for memory in MEMORIES), ("gated_deltanet", AFTER)])
@given(turns=turns(), quantized=st.integers(1, 12))
@example(turns=Turns(window=3, sinks=1, chunks=[[25, 14], [1, 1], [9, 2], [1, 1], [1, 1]]), quantized=12)
@settings(max_examples=examples(1, 12), derandomize=True)
@example(turns=Turns(window=6, sinks=3, chunks=[[15, 4], [1, 1], [9, 2], [1, 1], [1, 1]]), quantized=4)
@example(turns=Turns(window=4, sinks=4, chunks=[[20, 10], [10, 2], [1, 1], [1, 1]]), quantized=30)
@example(turns=Turns(window=3, sinks=2, chunks=[[9, 2], [7, 0], [7, 0], [3, 4], [1, 1], [1, 1]]), quantized=2)
@example(turns=Turns(window=3, sinks=2, chunks=[[20, 3], *[[1, 1]] * 8]), quantized=3)
def test_a_padded_batch_is_its_rows_alone(
    memory: str, form: tuple[int, int, bool], turns: Turns, quantized: int
) -> None:
    assert_rows_alone(with_tier(shared(memory), turns.window, turns.sinks, quantized, form=form), turns)


@pytest.mark.parametrize("chunks", [[[3], [20], [1], [1]], [[2], [30]]])
def test_a_single_row_with_padding(chunks: list[list[int]]) -> None:
    model = with_tier(shared("gated_deltanet"), 4, 2, 5)
    ids, mask, (own,) = padded(chunks)
    ids, mask = (torch.nn.functional.pad(x, (12, 0)) for x in (ids, mask))
    lengths = [chunk[0] for chunk in chunks]
    logits = read(model, ids, [lengths[0] + 12, *lengths[1:]], ahn.AHNCache.for_model(model), mask)
    alone = read(model, own[None], [len(own)], ahn.AHNCache.for_model(model))
    assert relative_error(logits[0, 12:], alone[0]) < TOLERANCE


@pytest.mark.sample(2)
@pytest.mark.parametrize(("memory", "form"), [*((memory, BEFORE) for memory in MEMORIES[:3]), ("mamba2", AFTER)])
@given(turns=turns(), quantized=st.integers(1, 12))
@settings(max_examples=examples(1, 12), derandomize=True)
@example(turns=Turns(window=5, sinks=2, chunks=[[9, 9], [1, 1], [30, 30], [1, 1], [1, 1], [4, 4]]), quantized=6)
@example(turns=Turns(window=6, sinks=3, chunks=[[15, 4], [1, 1], [9, 2], [1, 1], [1, 1]]), quantized=4)
def test_codes_that_lose_nothing_are_a_wider_window(
    memory: str, form: tuple[int, int, bool], turns: Turns, quantized: int
) -> None:
    """Who sees whom, what is written when: all as with a window of W + C, if a code is the number itself."""
    ids, mask, _ = padded(turns.chunks)
    lengths = [max(chunk) for chunk in turns.chunks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ahn.cache.tier.encode", lambda x, unbiased, bits: (x, x[..., 0]))
        patch.setattr("ahn.cache.tier.decode", lambda codes, scale, dtype, bits: codes)
        patch.setattr("ahn.cache.tier.decode_rotated", lambda codes, scale, dtype, bits: rotate(codes))
        patch.setattr(Near, "tier_reach", 0)
        model = with_tier(shared(memory), turns.window, turns.sinks, quantized, form=form)
        narrow = ahn.AHNCache.for_model(model)
        found = read(model, ids, lengths, narrow, mask)
    model = with_tier(model, turns.window + quantized, turns.sinks, 0)
    wide = ahn.AHNCache.for_model(model)
    expected = read(model, ids, lengths, wide, mask)
    assert relative_error(found[mask.bool()], expected[mask.bool()]) < TOLERANCE
    for index, layer in wide.memory_layers.items():
        if memory != "window_only":
            state = narrow.memory_layers[index].state
            assert state is not None and layer.state is not None
            assert relative_error(state.memory["state"], layer.state.memory["state"]) < TOLERANCE


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    model = with_tier(shared(architecture=architecture), 9, 2, 7)
    ids = tokens(2, 40)
    whole, found = (ahn.AHNCache.for_model(model) for _ in range(2))
    expected = read(model, ids, [40], whole)
    assert relative_error(read(model, ids, [7, 1, 5, 1, 1, 1, 6, 1, 1, 10, 6], found), expected) < TOLERANCE
    assert_same_layers(found, whole)
    ids, mask, rows = padded([[40, 23]])
    logits = read(model, ids, [40], ahn.AHNCache.for_model(model), mask)
    for row, own in enumerate(rows):
        alone = read(model, own[None], [len(own)], ahn.AHNCache.for_model(model))
        assert relative_error(logits[row, mask[row].bool()], alone[0]) < TOLERANCE


@pytest.mark.sample(4)
@pytest.mark.parametrize("memory", EVERYTHING)
def test_none_is_none(memory: str) -> None:
    """quantized = 0 is the same computation as without the option, and leaves nothing in the cache."""
    model = with_tier(adapted(memory=memory), 6, 2, 0)
    cache = ahn.AHNCache.for_model(model)
    read(model, tokens(2, 30), [30], cache)
    assert not any("quantized" in name for name in cache.memory_layers[0].tensors())


def test_slots_that_only_quantized_tokens_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory may have none for the window alone; attention must not then take a way that knows no slots."""
    monkeypatch.setattr("ahn.memory.pooling.PooledMemory.slot_count", lambda self, window: window // 8)
    model = with_tier(shared("ct_avg"), 5, 1, 20)
    ids = tokens(1, 60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for lengths in ([6, *[18] * 3], [6, *[1] * 54]):
            found = read(model, ids, lengths, ahn.AHNCache.for_model(model))
            assert relative_error(found, whole) < TOLERANCE


@pytest.mark.parametrize(
    ("window", "sinks", "distance", "before", "expected"),
    [
        (480, 32, 8192, True, 4096),  # half of what the base knows
        (2200, 48, 8192, True, 4496),  # as much again as is exact
        (6000, 48, 8192, True, 8191),  # no farther than the base knows
        (8190, 2, 8192, True, 8196),  # beyond the window all the same
        (480, 32, 0, True, 0),
        (480, 32, 8192, False, 0),
    ],
)
def test_from_where_tokens_are_seen_at_one_distance(
    window: int, sinks: int, distance: int, before: bool, expected: int
) -> None:
    config = ahn.AHNConfig(window=window, sinks=sinks, max_distance=distance, keys_before_rope=before)
    assert config.tier_reach == expected
    assert not expected or expected >= config.lossless + 4


@pytest.mark.sample(1)
@pytest.mark.parametrize("memory", ["gated_deltanet", "window_only"])
def test_far_beyond_what_the_base_knows(memory: str) -> None:
    """Sinks move along, tokens of the tier stay at their distance: chunks of any size and steps agree all the same."""
    model = with_tier(shared(memory), 6, 2, 30)
    model.ahn_config = ahn.AHNConfig(**vars(model.ahn_config) | {"max_distance": 64, "prefill_chunk_size": 50})
    assert model.ahn_config.tier_reach == 32
    ids = tokens(2, 140)
    whole, found = (ahn.AHNCache.for_model(model) for _ in range(2))
    expected = read(model, ids, [140], whole)
    assert relative_error(read(model, ids, [7, 1, 30, *[1] * 20, 40, 3, *[1] * 30, 9], found), expected) < TOLERANCE
    assert_same_layers(found, whole)


def test_a_base_whose_rope_cannot_be_undone_says_so() -> None:
    assert ahn.attach(base("gemma3"), ahn.AHNConfig(window=6, sinks=2)).ahn_config.keys_before_rope is False
    assert ahn.attach(base("llama"), ahn.AHNConfig(window=6, sinks=2)).ahn_config.keys_before_rope is True


# -- in conversations --------------------------------------------------------------------------------------------------


def conversation() -> tuple[PreTrainedModel, ahn.AHNCache]:
    model = with_tier(shared("mamba2"), 6, 2, 14)
    model.ahn_config = ahn.AHNConfig(**vars(model.ahn_config) | {"max_distance": 32})
    assert model.ahn_config.tier_reach == 16  # of the tokens that will be read, the first are farther
    cache = ahn.AHNCache.for_model(model)
    read(model, tokens(3, 21), [20, 1], cache)
    return model, cache


def goes_on(model: PreTrainedModel, cache: ahn.AHNCache, rows: list[int] | None = None) -> Tensor:
    rows = [0, 1, 2] if rows is None else rows
    return read(model, tokens(3, 9, seed=1)[rows], [3, 1, 5], cache)


def test_copies_are_independent() -> None:
    model, cache = conversation()
    other = copy.deepcopy(cache)
    expected = goes_on(model, other)
    assert torch.equal(goes_on(model, cache), expected)


def test_rows_can_be_reordered_repeated_and_selected() -> None:
    model, cache = conversation()
    expected = goes_on(model, copy.deepcopy(cache))
    for rows, change in (
        ([2, 0, 0], lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))),
        ([1], lambda c: c.batch_select_indices(torch.tensor([1]))),
        ([0, 0, 1, 1, 2, 2], lambda c: c.batch_repeat_interleave(2)),
    ):
        other = copy.deepcopy(cache)
        change(other)
        assert relative_error(goes_on(model, other, rows), expected[rows]) < TOLERANCE


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, cache = conversation()
    cache.save(tmp_path / "cache.safetensors")
    with_tier(model, 3, 1, 0)  # a conversation keeps its own settings
    loaded = ahn.AHNCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.config == cache.config and loaded.config.quantized == 14
    assert loaded.nbytes() == cache.nbytes()
    assert torch.equal(goes_on(model, loaded), goes_on(model, cache))


@pytest.mark.parametrize("quantized", [0, 5])
def test_a_file_from_before_the_option_loads(quantized: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without codes, or with those of two bits of keys after RoPE."""
    model = with_tier(shared("mamba2"), 6, 2, quantized, form=AFTER)
    model.ahn_config = ahn.AHNConfig(**vars(model.ahn_config) | {"max_distance": 0})
    cache = ahn.AHNCache.for_model(model)
    read(model, tokens(3, 20), [20], cache)
    newer = {"max_distance", "key_bits", "value_bits", "keys_before_rope", *(() if quantized else ("quantized",))}
    fields = {name: x for name, x in vars(cache.config).items() if name not in newer}
    with monkeypatch.context() as patch:
        patch.setattr("ahn.cache.conversation.dataclasses.asdict", lambda config: fields)
        cache.save(tmp_path / "cache.safetensors")
    with_tier(model, 6, 2, quantized)
    loaded = ahn.AHNCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.config == cache.config
    assert torch.equal(goes_on(model, loaded), goes_on(model, cache))


def test_crop_is_refused_once_a_token_has_left() -> None:
    _, cache = conversation()
    with pytest.raises(ahn.AHNError, match="cannot be undone"):
        cache.crop(-1)


@torch.no_grad()
def test_generation_and_beams() -> None:
    model = with_tier(shared("gated_deltanet"), 6, 2, 5)
    ids, mask, _ = padded([[30, 17]])
    for options in ({"do_sample": False}, {"num_beams": 3}):
        written = model.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
        alone = model.generate(ids[1:, 13:], max_new_tokens=12, **options)
        assert torch.equal(written[1, 13:], alone[0])


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_training_is_refused() -> None:
    model = with_tier(shared(), 6, 2, 5)
    with pytest.raises(ahn.AHNError, match="quantized = 5 is for inference"):
        model(tokens(1, 30), use_cache=False)
    with pytest.raises(ahn.AHNError, match="quantized = 5 is for inference"):
        model(tokens(1, 30), labels=tokens(1, 30))  # with a cache, as models make one by default
    cache = ahn.AHNCache.for_model(model)
    with_tier(model, 6, 2, 0)  # a conversation keeps its own settings
    with pytest.raises(ahn.AHNError, match="quantized = 5 is for inference"):
        model(tokens(1, 30), past_key_values=cache)
    with torch.no_grad():  # what was refused has left nothing behind
        model(tokens(1, 30), past_key_values=cache)
    with_tier(model, 6, 2, 5)
    with pytest.raises(ahn.AHNError, match="quantized = 5 is for inference"):
        distillation_loss(model, {"input_ids": tokens(1, 30)}, 6, 2)
    with torch.no_grad():
        assert model(tokens(1, 30), labels=tokens(1, 30)).loss.isfinite()


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_impossible_numbers(value: object) -> None:
    with pytest.raises(ahn.AHNError, match="quantized must be an integer ≥ 0"):
        ahn.AHNConfig(quantized=value)


def test_head_dimensions_that_do_not_fit_into_bytes() -> None:
    with pytest.raises(ahn.AHNError, match="multiple of 4"):
        ahn.attach(base(head_dim=6), ahn.AHNConfig(quantized=4))
    model = ahn.attach(base(head_dim=6), ahn.AHNConfig())
    with pytest.raises(ahn.AHNError, match="multiple of 4"):
        ahn.set_window(model, 10, 2, quantized=4)
    ahn.set_window(model, 10, 2)
    assert model.ahn_config.window == 10 and model.ahn_config.quantized == 0

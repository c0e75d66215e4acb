"""transformers 5.24 renamed `past_key_values` to `cache`: an adapted model takes both in all versions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import adapted, base, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache, AHNError, private
from ahn.measure.reading import in_chunks, new_cache

NAMES = pytest.mark.parametrize("name", private.CACHE_NAMES)
LENGTH = 30  # longer than sinks, window and a chunk


def student() -> PreTrainedModel:
    return adapted("qwen3", window=9, sinks=2, prefill_chunk_size=7)


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@NAMES
@pytest.mark.parametrize("part", ["model", "decoder"])
def test_a_forward_reads_on_with_the_cache(part: str, name: str) -> None:
    model, ids = student(), tokens(2, LENGTH)
    called = model if part == "model" else model.get_decoder()
    cache = AHNCache.for_model(model)
    with torch.no_grad():
        outputs = [called(x, **{name: cache}) for x in ids.split([20, 1, 9], dim=1)]
    found = torch.cat([x[0] for x in outputs], dim=1)  # logits or hidden states
    assert cache.seen == LENGTH and all(x[private.CACHE] is cache for x in outputs)
    expected = whole(model, ids)
    torch.testing.assert_close(found if part == "model" else model.lm_head(found), expected, atol=1e-4, rtol=0)


@NAMES
def test_generate_reads_on_with_the_cache(name: str) -> None:
    model, ids = student(), tokens(1, LENGTH)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    cache = AHNCache.for_model(model)
    with torch.no_grad():
        model(ids[:, :20], **{name: cache})
    assert torch.equal(model.generate(ids, **{name: cache}, **options), model.generate(ids, **options))
    assert cache.seen == LENGTH + 4  # the last token was chosen, not read


@NAMES
def test_a_switched_off_adapter_refuses_its_cache(name: str) -> None:
    model = student()
    cache = AHNCache.for_model(model)
    with ahn.disabled(model):
        for part in (model, model.get_decoder()):
            with pytest.raises(AHNError, match="of no use"):
                part(tokens(1, 3), **{name: cache})


@NAMES
def test_accelerate_leaves_the_cache_where_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its hook moves whatever has `to`, except what transformers names: under one of both names."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = base()
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True, skip_keys=private.CACHE))
    ahn.attach(model, ahn.AHNConfig(window=9, sinks=2))
    cache = AHNCache.for_model(model)
    monkeypatch.setattr(AHNCache, "to", lambda *args, **kwargs: pytest.fail("moved"))
    with torch.no_grad():
        model(tokens(1, 3), **{name: cache})
    assert cache.seen == 3


def test_two_caches_are_refused() -> None:
    model = student()
    given = {name: AHNCache.for_model(model) for name in private.CACHE_NAMES}
    for call in (model, model.get_decoder(), model.generate):
        with pytest.raises(AHNError, match="two names of one argument"):
            call(tokens(1, 3), **given)
    with torch.no_grad():  # one of them empty is one cache
        model(tokens(1, 3), past_key_values=None, cache=given["cache"])
    assert given["cache"].seen == 3


@pytest.mark.parametrize("attached", [True, False])
def test_our_own_reading_uses_the_name_of_this_version(attached: bool) -> None:
    """Another name is a warning, or (before 5.24) taken without a word and ignored."""
    model, ids = student() if attached else base(), tokens(1, LENGTH)
    cache = new_cache(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        logits = [x for _, x in in_chunks(model, cache, ids[0], 0, LENGTH, 7, logits=0)]
    torch.testing.assert_close(torch.cat(logits)[None], whole(model, ids), atol=1e-4, rtol=0)

"""`ahn.inspect.without`: heads off exactly, others untouched, whatever reads the text."""

from __future__ import annotations

import pytest
import torch
from models import RECURRENT, adapted, tokens
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache, AHNError

WINDOW, SINKS, LENGTH = 9, 3, 60


def made(memory: str, **options: bool) -> PreTrainedModel:
    return adapted(memory=memory, window=WINDOW, sinks=SINKS, prefill_chunk_size=24, **options)


@pytest.mark.sample(3)
@torch.no_grad()
@pytest.mark.parametrize("off", ["both", "write", "read"])
@pytest.mark.parametrize("memory", RECURRENT)
def test_without_everything_is_sinks_and_window(memory: str, off: str) -> None:
    """Bit for bit, padded, with and without a cache, in steps. Without writes alone the state is empty: reads of 0."""
    model, plain, ids = made(memory, router=True, q_proj=True), made("window_only"), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    how = {"write": off == "read", "read": off == "write"}
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    with ahn.inspect.without(model, **how):
        assert torch.equal(model(ids).logits, plain(ids).logits)
        for options in ({"use_cache": False}, {"attention_mask": mask}):
            assert torch.equal(model(ids, **options).logits, plain(ids, **options).logits)
        written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, plain.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.sample(2)
@torch.no_grad()
@pytest.mark.parametrize("memory", RECURRENT)
def test_heads_that_do_not_write(memory: str) -> None:
    model, ids = made(memory), tokens(1, LENGTH)
    whole, less = AHNCache.for_model(model), AHNCache.for_model(model)
    model(ids, past_key_values=whole)
    with ahn.inspect.without(model, layers=[0], heads=[2, 3], read=True):  # of one key head
        model(ids, past_key_values=less)
    state, before = (kv.layers[0].state.memory["state"].reshape(1, 4, -1) for kv in (less, whole))
    assert (state[:, 2:] == 0).all() and (before[:, 2:] != 0).any()
    assert torch.equal(state[:, :2], before[:, :2])
    assert (less.layers[1].state.memory["state"] != 0).any((2, 3)).all()


@torch.no_grad()
def test_what_was_written_before_stays_untouched() -> None:
    """Neither written nor decayed: a closed gate leaves the state as it is."""
    model, kv = made("gated_deltanet"), AHNCache.for_model(made("gated_deltanet"))
    model(tokens(1, LENGTH), past_key_values=kv)
    before = kv.layers[0].state.memory["state"].clone()
    with ahn.inspect.without(model, heads=[3], read=True):
        for token in tokens(1, 20, seed=1).unbind(1):
            model(token[:, None], past_key_values=kv)
    after = kv.layers[0].state.memory["state"]
    assert torch.equal(after[:, 3], before[:, 3]) and not torch.equal(after[:, :3], before[:, :3])


@pytest.mark.sample(2)
@torch.no_grad()
@pytest.mark.parametrize("memory", RECURRENT)
def test_heads_that_are_not_read(memory: str) -> None:
    """As if their projection were zero, which is behind the norm; the states are those of the whole memory."""
    model, ids = made(memory), tokens(1, LENGTH)
    kv, mute = AHNCache.for_model(model), AHNCache.for_model(model)
    with ahn.inspect.without(model, layers=[1], heads=[0, 3], write=True):
        out = model(ids, past_key_values=kv).logits
    model.model.layers[1].ahn.fn.o_proj.weight[[0, 3]] = 0
    assert torch.equal(out, model(ids, past_key_values=mute).logits)
    for layer, same in zip(kv.layers, mute.layers, strict=True):
        assert torch.equal(layer.state.memory["state"], same.state.memory["state"])


@pytest.mark.sample(2)
@torch.no_grad()
@pytest.mark.parametrize("memory", RECURRENT)
def test_tokens_that_are_kept_out(memory: str) -> None:
    """In a padded batch, chunks and steps: exactly these writes are gone."""
    model, ids = made(memory), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    unwanted = torch.rand(LENGTH) < 0.5
    for sizes in ((LENGTH,), (30, 1, 1, 28)):
        kv, start = AHNCache.for_model(model), 0
        with ahn.inspect.record(model) as trace, ahn.inspect.without(model, heads=[1], read=True, tokens=unwanted):
            for size in sizes:
                part = ids[:, start : start + size]
                start += size
                model(part, past_key_values=kv, attention_mask=mask[:, :start])
        for writes in trace.writes.values():
            out = (writes.positions < 0) | unwanted[writes.positions.clamp_min(0)]
            assert torch.equal(writes.strength[:, 1] == 0, out)
            shared = memory == "routed_deltanet"  # by the query heads 0 and 1
            assert torch.equal(writes.strength[:, 0] == 0, out if shared else writes.positions < 0)
            assert torch.equal(writes.strength[:, 2] == 0, writes.positions < 0)


def test_tokens_choose_writes() -> None:
    model = made("gated_deltanet")
    with pytest.raises(AHNError, match="write=False and read=True"), ahn.inspect.without(model, tokens=torch.ones(9)):
        pass
    with (
        ahn.inspect.without(model, read=True, tokens=torch.ones(40).bool()),
        pytest.raises(AHNError, match="Position 50 leaves the window, but `tokens` has 40"),
    ):
        model(tokens(1, LENGTH))


@torch.no_grad()
def test_blocks_nest_record_and_end() -> None:
    model, plain, ids = made("gated_deltanet"), made("window_only"), tokens(1, LENGTH)
    right = model(ids).logits
    without = ahn.inspect.without
    with (
        ahn.inspect.record(model) as trace,
        without(model, [0]),
        without(model, [1], [0, 1]),
        without(model, [1], [2, 3]),
    ):
        assert torch.equal(model(ids).logits, plain(ids).logits)
    for layer in (0, 1):  # a recording sees what is left, whichever was opened first
        assert (trace.writes[layer].strength == 0).all() and (trace.writes[layer].update == 0).all()
        assert (trace.reads[layer].memory == 0).all() and (trace.reads[layer].exact > 0).all()
    with pytest.raises(ZeroDivisionError), ahn.inspect.without(model):
        raise ZeroDivisionError
    with ahn.inspect.without(model, write=True, read=True):
        assert torch.equal(model(ids).logits, right)
    assert torch.equal(model(ids).logits, right)


def test_wrong_heads_and_layers() -> None:
    model = adapted(window=WINDOW, sinks=SINKS, full_attention_layers=(0,))
    for layers, heads, words in ([0], None, "Layer 0 has no memory; layers 1"), ([1], [4], "no head 4"):
        with pytest.raises(AHNError, match=words), ahn.inspect.without(model, layers, heads):
            pass
    with pytest.raises(AHNError, match="ct_max keeps no"), ahn.inspect.without(made("ct_max")):
        pass

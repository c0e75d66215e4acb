"""Bases with recurrent layers: in layers of their own (Qwen3.5, LFM 3), or beside a layer's attention (Falcon-H1).

What such a layer keeps goes with the conversation in everything that is done to it, as what attention keeps does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error
from models import adapted, awaken, positions, tokens
from safetensors.torch import load_file
from support.architectures import TYPES, build, in_float64, read
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache, AHNError
from ahn.cache import rows
from ahn.cache.checks import Stored, check_layout
from ahn.shape import ModelShape
from ahn.wrappers import attention_of, decoder_of

TOLERANCE = 1e-5  # float32, batches of other sizes, a few steps through two layers
BASES = ("falcon_h1", "qwen3_5_text", "lfm3", "nemotron_h", "bamba")
BASES = tuple(x for x in BASES if x in TYPES)  # older versions lack some
LENGTH = 30


@cache
def model_of(model_type: str) -> PreTrainedModel:
    return awaken(ahn.attach(build(model_type), ahn.AHNConfig(window=9, sinks=2)))


def conversation(model: PreTrainedModel, ids: Tensor) -> AHNCache:
    cache = AHNCache.for_model(model)
    read(model, ids, [ids.shape[1]], cache)
    return cache


def go_on(model: PreTrainedModel, cache: AHNCache) -> Tensor:
    assert cache.rows is not None
    return read(model, tokens(cache.rows, 4, seed=1), [1, 2, 1], cache)


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_are_chosen(model: PreTrainedModel, change: Callable[[AHNCache], None], chosen: list[int]) -> None:
    ids = tokens(3, LENGTH)
    cache = conversation(model, ids)
    change(cache)
    assert relative_error(go_on(model, cache), go_on(model, conversation(model, ids[chosen]))) < TOLERANCE


def test_a_cache_that_forgets_takes_another_number_of_rows(model: PreTrainedModel) -> None:
    cache = conversation(model, tokens(3, LENGTH))
    cache.reset()
    read(model, tokens(2, LENGTH), [LENGTH], cache)
    assert torch.equal(go_on(model, cache), go_on(model, conversation(model, tokens(2, LENGTH))))


def test_what_was_read_under_inference_mode_goes_on_outside(model: PreTrainedModel) -> None:
    """A layer changes its recurrent state in place, which such a tensor does not allow."""
    with torch.inference_mode():
        cache = conversation(model, tokens(1, LENGTH))
    assert torch.equal(go_on(model, cache), go_on(model, conversation(model, tokens(1, LENGTH))))


def test_a_conversation_goes_on_in_the_numbers_that_the_model_computes_in(model: PreTrainedModel) -> None:
    double = in_float64(copy.deepcopy(model))
    cache, expected = (conversation(double, tokens(1, LENGTH)) for _ in range(2))
    assert relative_error(go_on(model, cache), go_on(double, expected)) < TOLERANCE


def test_rows_that_were_read_apart_go_on_together_and_apart_again(model: PreTrainedModel) -> None:
    caches = [conversation(model, tokens(1, length, seed=length)) for length in (LENGTH, 12, 5)]
    alone = copy.deepcopy(caches)
    batch, new = rows.join(caches), tokens(3, 4, seed=2)
    for place in range(4):
        given: dict[str, Any] = {"position_ids": torch.tensor(rows.lengths(batch))[:, None], "past_key_values": batch}
        with torch.no_grad():
            logits = model(new[:, place : place + 1], attention_mask=rows.mask(batch), **given).logits
    for row, single in enumerate(alone):
        assert relative_error(logits[row], read(model, new[row : row + 1], [1] * 4, single)[0, -1:]) < TOLERANCE
        again = rows.copied(rows.take(batch, row, torch.device("cpu")), torch.device("cpu"))
        assert relative_error(go_on(model, again), go_on(model, single)) < TOLERANCE


def test_bytes_are_those_of_all_that_is_kept(model: PreTrainedModel) -> None:
    cache = conversation(model, tokens(1, LENGTH))
    assert cache.nbytes() == sum(x.nbytes for x in cache.content()[0].values())


@pytest.mark.parametrize("part", ["first layer", "last layer", "first mixer"])
def test_a_forward_that_stopped_halfway_is_found(model: PreTrainedModel, part: str) -> None:
    """A recurrent layer does not say how much it has read: read again, its tokens would count twice."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    cache, layers = conversation(model, tokens(1, LENGTH)), decoder_of(model).layers
    if part == "first mixer":
        first = next(layer for layer in layers if hasattr(layer, "ahn"))
        handle = attention_of(model, first.ahn.index).register_forward_pre_hook(stop)
    else:
        handle = layers[0 if part == "first layer" else -1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        read(model, tokens(1, 3), [3], cache)
    handle.remove()
    with pytest.raises(AHNError, match="stopped halfway"):
        read(model, tokens(1, 3), [3], copy.deepcopy(cache))
    cache.reset()
    read(model, tokens(1, LENGTH), [LENGTH], cache)
    assert torch.equal(go_on(model, cache), go_on(model, conversation(model, tokens(1, LENGTH))))


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_padding_amid_a_text_is_refused(model: PreTrainedModel, rows: int) -> None:
    """In any forward, the first included: of 12 tokens nothing has left the window, of 30 some have."""
    cache = conversation(model, tokens(rows, LENGTH))
    mask = torch.ones(rows, LENGTH + 4, dtype=torch.long)
    mask[-1, LENGTH] = 0
    with pytest.raises(AHNError, match="padding amid a text"):
        model(tokens(rows, 4), attention_mask=mask, past_key_values=cache)
    go_on(model, cache)  # nothing was read
    for length, holes in ((8, [3]), (LENGTH, [3, 4]), (LENGTH, [25])):
        mask, cache = torch.ones(rows, length, dtype=torch.long), AHNCache.for_model(model)
        mask[-1, holes] = 0
        for given in ({"past_key_values": cache}, {"use_cache": False}, {}):
            with pytest.raises(AHNError, match="padding amid a text"):
                model(tokens(rows, length), attention_mask=mask, **given)
            with pytest.raises(AHNError, match="padding amid a text"):
                model.model(tokens(rows, length), attention_mask=mask, **given)
        with pytest.raises(AHNError, match="padding amid a text"):
            model.generate(tokens(rows, length), attention_mask=mask, max_new_tokens=2)
        assert cache.seen == 0
    with ahn.disabled(model):
        model(tokens(rows, LENGTH), attention_mask=mask)  # the base's business


@pytest.mark.parametrize("length", [8, LENGTH])
@torch.no_grad()
def test_padding_on_the_right_is_the_end_of_a_text(model: PreTrainedModel, length: int) -> None:
    mask, ids = torch.ones(2, length, dtype=torch.long), tokens(2, length)
    mask[1, -3:] = 0
    with pytest.raises(AHNError, match="padding amid a text"):  # before a token is read
        model.generate(ids, attention_mask=mask, max_new_tokens=1)
    cache = AHNCache.for_model(model)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits[1, :-3]
    assert relative_error(logits, model(ids[1:, :-3], use_cache=False).logits[0]) < TOLERANCE
    for given in ({"attention_mask": torch.cat([mask, mask[:, :1]], dim=1)}, {}):
        with pytest.raises(AHNError, match=r"padding amid a text|padding between real tokens"):
            model(tokens(2, 1), past_key_values=cache, **given)


@pytest.mark.parametrize("length", [8, LENGTH])
@torch.no_grad()
def test_padding_on_the_left_is_before_a_text(model: PreTrainedModel, length: int) -> None:
    """Whatever a tokenizer puts there, also where a row's text begins in a later forward."""
    mask, ids = torch.ones(2, length, dtype=torch.long), tokens(2, length)
    mask[0, :5] = 0
    expected = read(model, ids[:1, 5:], [length - 5])
    for counts in ([length], [3, length - 3], [5, length - 5]):
        cache, at, found = AHNCache.for_model(model), 0, []
        for count in counts:
            given: dict[str, Any] = {"position_ids": positions(mask)[:, at : at + count], "past_key_values": cache}
            new = ids[:, at : at + count]
            found.append(model(new, attention_mask=mask[:, : at + count], **given).logits)
            at += count
        assert relative_error(torch.cat(found, dim=1)[:1, 5:], expected) < TOLERANCE


def test_tokens_cannot_be_taken_out_of_a_recurrent_state() -> None:
    model = model_of("falcon_h1")
    cache = conversation(model, tokens(1, 5))  # nothing has left the window
    with pytest.raises(AHNError, match="recurrent layers keep one state"):
        cache.crop(-1)
    cache.crop(0)
    assert torch.equal(go_on(model, cache), go_on(model, conversation(model, tokens(1, 5))))


def test_a_file_without_a_recurrent_state_is_refused(tmp_path: Path) -> None:
    model, path = model_of("falcon_h1"), tmp_path / "conversation"
    conversation(model, tokens(1, LENGTH)).save(path)
    names = {torch.float32: "F32"}
    found = {name: Stored(names[x.dtype], tuple(x.shape)) for name, x in load_file(path).items()}
    shape = ModelShape.from_config(model.config)
    check_layout(found, model.ahn_config, LENGTH, 0, shape, "it")
    without = {name: x for name, x in found.items() if "_states" not in name}
    with pytest.raises(AHNError, match="recurrent_states is missing"):
        check_layout(without, model.ahn_config, LENGTH, 0, shape, "it")
    wrong = {name: Stored("I64", x.shape) if "conv_states" in name else x for name, x in found.items()}
    with pytest.raises(AHNError, match="holds I64"):
        check_layout(wrong, model.ahn_config, LENGTH, 0, shape, "it")
    # A state of another size, with its checksum: only the base's own code knows the size, but layers have the same.
    name = max(name for name in found if "conv_states" in name)
    other = found | {name: Stored(found[name].dtype, (*found[name].shape[:-1], 3))}
    with pytest.raises(AHNError, match=rf"is damaged: {name} has shape"):
        check_layout(other, model.ahn_config, LENGTH, 0, shape, "it")


def test_a_recurrent_model_is_refused_as_an_assistant_before_anything_is_read() -> None:
    model = model_of("falcon_h1")
    with pytest.raises(AHNError, match="FalconH1ForCausalLM with an AHN cannot be the assistant_model"):
        adapted(window=9, sinks=2).generate(tokens(1, 30), assistant_model=model)
    with pytest.raises(AHNError, match="guessed wrong cannot be taken out again: generate without"):
        model.generate(tokens(1, 30), prompt_lookup_num_tokens=3)

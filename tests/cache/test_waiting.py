"""Tokens that wait beside the window can be taken out again, and until then change no number.

Models with quantized tokens compute in float64, as in `test_tier`: a number on the edge of two codes would fall to
either side.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import EVERYTHING, adapted, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from talk import Talk
from transformers import PreTrainedModel

from ahn import AHNCache, AHNError
from ahn.cache import rows

WINDOW, SINKS = 9, 2
LOSSLESS = WINDOW + SINKS
TOLERANCE = 1e-4  # float32 (of memories at least) in another order of operations, through two layers


def student(architecture: str = "qwen3", **config: Any) -> PreTrainedModel:
    model = adapted(architecture, **{"window": WINDOW, "sinks": SINKS} | config)
    return model.double() if config.get("quantized") else model


def stop_recording(talk: Talk) -> None:
    for layer in talk.cache.layers:
        layer.record_past = False


def recording(model: PreTrainedModel, counts: tuple[int, ...], seed: int = 0) -> Talk:
    """A conversation that has read so many tokens, the last of which may be taken out."""
    talk = Talk(model, 1, seed=seed)
    for count in counts[:-1]:
        talk.read([count])
    talk.cache.activate_past_recording()
    talk.read([counts[-1]])
    return talk


@pytest.mark.sample(4)
@pytest.mark.parametrize("memory", EVERYTHING)
@pytest.mark.parametrize("quantized", [0, 5])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma3"])
def test_what_is_read_is_taken_out_and_read_again(architecture: str, memory: str, quantized: int) -> None:
    """Forwards of any sizes and crops of any sizes, sometimes several in a row, sometimes none."""
    draw, talk = random.Random(memory), Talk(student(architecture, memory=memory, quantized=quantized), 1)
    talk.cache.activate_past_recording()
    for _ in range(8):
        for _ in range(draw.choice((1, 1, 2))):
            talk.read([draw.choice((1, 1, 2, 4, 7, 20))])
        recorded = talk.cache.progress.waiting
        for _ in range(draw.choice((1, 1, 2))):
            gone = draw.randint(0, recorded // 2)
            talk.crop(gone)
            recorded -= gone
        assert {layer.get_seq_length() for layer in talk.cache.layers} == {len(talk.rows[0])}
    talk.check(TOLERANCE)
    stop_recording(talk)
    talk.steps(3)
    talk.check(TOLERANCE)
    held = [getattr(layer, "sliding_window", LOSSLESS + 1) - 1 for layer in talk.cache.layers]
    assert [layer.keys.shape[2] for layer in talk.cache.layers] == held, "nothing waits any more"


def test_twice_in_a_row_from_a_layer_that_slides() -> None:
    """Gemma 3's own layers see 6 tokens; transformers' crop would leave these and take the next out of them."""
    talk = recording(student("gemma3"), (30, 8))
    for gone in (3, 0, 4):
        talk.crop(gone)
    talk.read([2])
    talk.check(TOLERANCE)
    sliding = talk.cache.layers[0]
    assert sliding.keys.shape[2] == 5 + 2, "what was recorded before does not stay"
    stop_recording(talk)
    talk.read([1])
    talk.read([3])
    talk.check(TOLERANCE)


def test_a_layer_that_slides_holds_no_earlier_tokens() -> None:
    """Within the AHN's window everything can be taken out, but the base's own layers have forgotten."""
    talk = Talk(student("gemma3"), 1)
    talk.read([8])
    with pytest.raises(AHNError, match=r"Cannot crop 3 tokens: layer 0 sees the last 6 tokens"):
        talk.cache.crop(-3)
    talk.cache.activate_past_recording()
    talk.read([2])
    with pytest.raises(AHNError, match=r"Cannot crop 5 tokens"):
        talk.cache.crop(-5)
    talk.crop(2)
    talk.read([5])
    talk.check(TOLERANCE)
    short = Talk(student("gemma3"), 1)
    short.read([5])
    short.crop(5)
    short.read([9])
    short.check(TOLERANCE)


def test_everything_can_be_taken_out_while_nothing_has_left_for_good() -> None:
    talk = recording(student(quantized=3), (LOSSLESS - 2, 8))
    assert talk.cache.progress.waiting == 6
    talk.crop(12)
    talk.read([30])
    talk.check(TOLERANCE)


def test_beyond_what_waits_nothing_can_be_taken_out() -> None:
    talk = recording(student(), (20, 6))
    with pytest.raises(AHNError, match=r"Cannot crop 7 tokens .* read 26: 9 of them .* only the last 6 wait"):
        talk.cache.crop(-7)
    talk.crop(4)
    with pytest.raises(AHNError, match="only the last 2 wait"):
        talk.cache.crop(-3)
    talk.crop(2)
    talk.read([5])
    talk.check(TOLERANCE)


@pytest.mark.parametrize("memory", ["gated_deltanet", "routed_deltanet", "retained"])
def test_tier_and_memory_hold_only_what_has_left_for_good(memory: str) -> None:
    model = student(memory=memory, quantized=4)
    settled, talk = Talk(model, 1), recording(model, (30, 7))
    settled.read([30])
    for own, other in zip(talk.cache.layers, settled.cache.layers, strict=True):
        assert own.state.tier is not None
        for name, x in other.state.tensors().items():
            if name.startswith("state."):
                assert torch.equal(x, own.state.tensors()[name]), name


def test_only_tokens_whose_logits_are_wanted_wait() -> None:
    talk = Talk(student(), 1)
    talk.cache.activate_past_recording()
    with torch.no_grad():
        talk.model(tokens(1, 60), past_key_values=talk.cache, logits_to_keep=4)
        assert talk.cache.progress.waiting == 4
        talk.model(tokens(1, 8), past_key_values=talk.cache, logits_to_keep=torch.tensor([7]))
    assert talk.cache.progress.waiting == 12


@pytest.mark.sample(4)
@pytest.mark.parametrize("counts", [(6, 8), (25, 6)], ids=["at the edge", "beyond"])
@pytest.mark.parametrize(
    ("memory", "architecture"),
    [("gated_deltanet", "qwen3"), ("retained", "qwen3"), ("ct_max", "qwen3"), ("window_only", "gemma3")],
)
def test_saved_and_forked_conversations(
    memory: str, architecture: str, counts: tuple[int, ...], tmp_path: Path
) -> None:
    model = student(architecture, memory=memory, quantized=3)
    talk = recording(model, counts)
    talk.cache.save(tmp_path / "cache")
    fork, loaded = copy.deepcopy(talk), copy.deepcopy(talk)
    loaded.cache = AHNCache.load(tmp_path / "cache", model)
    for each in (talk, fork, loaded):
        each.crop(2)
        each.read([1])
        each.read([9])
        each.check(TOLERANCE)
    fork.cache.crop(-9)
    with pytest.raises(AHNError, match="only the last 0 wait"):
        loaded.cache.crop(-9)


@pytest.mark.parametrize("waiting", [-1, 16, True, "6", 6.0, None, 5, 7])
def test_a_file_is_not_believed(waiting: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    recording(student(), (20, 6)).cache.save(path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["ahn"])
    assert description["waiting"] == 6
    save_file(load_file(path), path, {"ahn": json.dumps(description | {"waiting": waiting})})
    wrong = "keys" if waiting in (5, 7) else "waiting is"
    with pytest.raises(AHNError, match=wrong):
        AHNCache.load(path, student())


def test_rows_with_padding_settle_before_they_are_read() -> None:
    """Two copies go on as one batch, each with words of its own."""
    talk = recording(student(quantized=3), (20, 6))
    with pytest.raises(AHNError, match="only in a batch without padding"):
        pair = copy.deepcopy(talk)
        pair.cache.batch_repeat_interleave(2)
        pair.choose([0, 0])
        pair.read([2, 5])
    talk.cache.layers[0].record_past = False
    talk.cache.batch_repeat_interleave(2)
    talk.choose([0, 0])
    talk.read([2, 5])
    talk.steps(2)
    talk.check(TOLERANCE)
    assert talk.cache.layers[0].keys.shape[2] == LOSSLESS


def test_a_batch_of_fixed_slots_has_no_place_for_them() -> None:
    model = student()
    talk = recording(model, (20, 6))
    with pytest.raises(AHNError, match="wait to be taken out"):
        rows.join([talk.cache, recording(model, (20, 6)).cache])


def test_numbers_of_tokens_stay_numbers() -> None:
    """transformers 5.17 gives a tensor."""
    talk = recording(student(), (20, 6))
    talk.cache.crop(torch.tensor(-2))  # type: ignore[arg-type]
    assert (type(talk.cache.seen), type(talk.cache.progress.waiting)) == (int, int)


def test_on_apples_gpus_generate_does_without() -> None:
    """transformers would read a token too many there, and could not for padded rows."""
    layer = recording(student(), (20, 6)).cache.layers[0]
    layer.state.window.keys = SimpleNamespace(device=torch.device("mps"))
    assert layer.is_croppable
    layer.record_past = False
    assert not layer.is_croppable

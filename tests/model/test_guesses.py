"""Tokens that are guessed ahead: greedy text is the one without guesses, whatever has left the window meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from models import EVERYTHING, adapted, base, tokens
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import ahn
from ahn import AHNError

WINDOW, SINKS = 13, 3
LOSSLESS = WINDOW + SINKS
TIE = 1e-4
"""Logits closer than this, relative to the largest, are in no order: float32 in another order of operations."""

SLIDES_WRONG = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="a sliding layer of transformers that reads twice while it records has more keys than its mask: the base "
    "alone fails as well",
)


def student(architecture: str = "qwen3", seed: int = 0, **config: Any) -> PreTrainedModel:
    """With quantized tokens in float64, as in `test_tier`: a number on the edge of two codes falls to either side."""
    model = adapted(architecture, seed, **{"window": WINDOW, "sinks": SINKS} | config)
    return model.double() if config.get("quantized") else model


def repeating(length: int) -> Tensor:
    """A prompt in which a lookup finds something."""
    return tokens(1, 6).repeat(1, 1 + length // 6)[:, :length]


def greedy(model: PreTrainedModel, ids: Tensor, new: int = 30, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


@contextmanager
def lengths_read(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward of the model reads."""
    found: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield found
    hook.remove()


@torch.no_grad()
def assert_greedy(model: PreTrainedModel, text: Tensor, prompt: int) -> None:
    """Each token after the prompt is one that a forward over all of the text would choose."""
    logits = model(text).logits[0, prompt - 1 : -1]
    chosen = logits.gather(1, text[0, prompt:, None])[:, 0]
    assert bool((logits.max(-1).values - chosen <= TIE * logits.abs().max(-1).values).all())


def assistant(kind: str, model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    if kind == "lookup":
        return {"prompt_lookup_num_tokens": 4}
    another = {"itself": model, "its base": base(architecture), "another": student(architecture, 1, window=8)}
    return {"assistant_model": another[kind]}


@pytest.mark.sample(3)
@pytest.mark.parametrize("length", [5, LOSSLESS, 50])
@pytest.mark.parametrize("quantized", [0, 5])
@pytest.mark.parametrize("guess", ["lookup", "itself", "its base", "another"])
@pytest.mark.parametrize("memory", EVERYTHING)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_greedy_text_is_the_one_without_guesses(
    architecture: str, memory: str, guess: str, quantized: int, length: int
) -> None:
    model, ids = student(architecture, memory=memory, quantized=quantized), repeating(length)
    options = assistant(guess, model, architecture)
    with lengths_read(model) as read:
        found = greedy(model, ids, **options)
    assert found.shape == (1, length + 30)
    assert any(1 < n <= 21 for n in read[2:]), "guesses were read"
    assert_greedy(model, found, length)


def test_an_assistant_that_is_right_saves_forwards() -> None:
    model, same, ids = student(), student(), repeating(40)
    same.generation_config.num_assistant_tokens = 5
    same.generation_config.assistant_confidence_threshold = 0.0
    with lengths_read(model) as read:
        greedy(model, ids, assistant_model=same)
    assert read == [16, 24 + 5, *[6] * 4], "the prompt in two chunks, then one forward for 6 tokens"


@pytest.mark.parametrize("memory", ["deltanet", "retained"])
def test_drafts_that_grow_are_taken_out_again(memory: str) -> None:
    model, other, ids = student(memory=memory), student(memory=memory), repeating(20)
    other.generation_config.num_assistant_tokens_schedule = "heuristic"
    other.generation_config.num_assistant_tokens = 2
    other.generation_config.assistant_confidence_threshold = 0.0
    with torch.no_grad():
        other.lm_head.weight += 0.02 * torch.randn(other.lm_head.weight.shape)
    found = greedy(model, ids, 60, assistant_model=other)
    assert_greedy(model, found, 20)


def test_beyond_what_the_base_was_trained_on() -> None:
    """Sinks and retained tokens move along amid a draft, and back."""
    for memory, quantized in (("deltanet", 9), ("retained", 0)):
        model = student("llama", memory=memory, quantized=quantized, max_distance=40)
        assert_greedy(model, greedy(model, repeating(30), 30, prompt_lookup_num_tokens=7), 30)


@pytest.mark.parametrize("architecture", ["qwen3", pytest.param("gemma3", marks=SLIDES_WRONG)])
def test_a_conversation_goes_on_with_guesses_and_without(architecture: str) -> None:
    """Gemma 3 has layers of its own that see the last 6 tokens."""
    model, ids = student(architecture, quantized=5), repeating(20)
    cache = ahn.AHNCache.for_model(model)
    guess = {"assistant_model": base(architecture)}
    for options in ({"prompt_lookup_num_tokens": 5}, {}, guess, {"prompt_lookup_num_tokens": 3}):
        length = ids.shape[1]
        ids = greedy(model, ids, 8, past_key_values=cache, **options)
        assert cache.seen == length + 7 and not cache.progress.recording
        assert_greedy(model, ids, length)
        ids = torch.cat([ids, repeating(3)], dim=1)
    greedy(model, ids, 2, past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == LOSSLESS, "nothing waits any more"


def test_a_text_that_ends_amid_a_draft() -> None:
    """What comes after the end is taken out; the conversation goes on from there."""
    model, ids = student(), repeating(30)
    text = greedy(model, ids, 20)
    new = text[0, 30:].tolist()
    place = next(i for i in range(6, 20) if new[i] not in new[:i])
    cache = ahn.AHNCache.for_model(model)
    same = student()
    same.generation_config.assistant_confidence_threshold = 0.0
    found = greedy(model, ids, 20, past_key_values=cache, assistant_model=same, eos_token_id=new[place])
    assert torch.equal(found, text[:, : 30 + place + 1])
    assert cache.seen == 30 + place
    assert_greedy(model, greedy(model, found, 20, past_key_values=cache), found.shape[1])


def test_padding_and_inspection_are_refused_before_anything_is_read() -> None:
    model, ids = student(), repeating(12)
    mask = (torch.arange(12)[None] >= 2).long()
    padded = {"attention_mask": mask, "prompt_lookup_num_tokens": 4}
    assert greedy(model, ids, 3, **padded).shape == (1, 15), "within the window"
    with lengths_read(model) as read, pytest.raises(AHNError, match="takes a prompt without padding"):
        greedy(model, ids, 30, **padded)
    assert not read
    with ahn.inspect.record(model), pytest.raises(AHNError, match="cannot look on while tokens may be taken out"):
        greedy(model, ids, 30, prompt_lookup_num_tokens=4)


@torch.no_grad()
@pytest.mark.parametrize("pads", [0, 2])
def test_a_conversation_goes_on_with_guesses_from_its_new_tokens_alone(pads: int) -> None:
    """transformers cuts the mask to as many columns as it was given tokens; before 5.20 also a mask of ones."""
    model, before, new = student(window=60), repeating(20), repeating(12)
    mask = (torch.arange(32)[None] >= pads).long()
    texts = []
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        cache = ahn.AHNCache.for_model(model)
        model(before, attention_mask=mask[:, :20], past_key_values=cache)
        texts.append(greedy(model, new, 15, attention_mask=mask, past_key_values=cache, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["use_mtp", "assistant_early_exit"])
def test_guesses_of_the_model_itself_are_refused_before_they_cross_the_window(name: str) -> None:
    config = GenerationConfig(**{name: 1}, max_new_tokens=30, pad_token_id=0)
    model = student()
    with lengths_read(model) as read, pytest.raises(AHNError, match=rf"{name} works up to window \+ sinks = 16 tokens"):
        model.generate(repeating(12), generation_config=config)
    assert not read

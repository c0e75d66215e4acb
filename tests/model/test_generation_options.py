"""Options of `generate` in the ways people call it, each on a text that leaves the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import adapted, base, tokens
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedModel

from ahn import AHNError


def _without_a_cache(model: PreTrainedModel, ids: Tensor, **options: Any) -> tuple[list[Any], list[Any]]:
    """What `generate` says with its cache and without one, which reads all again for each token."""
    given = {"max_new_tokens": 6, "do_sample": False} | options
    torch.manual_seed(0)
    cached = model.generate(ids, **given)
    torch.manual_seed(0)
    return cached.tolist(), model.generate(ids, use_cache=False, **given).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 8, 9]},
        {"do_sample": True, "num_return_sequences": 3},
        {"guidance_scale": 1.5, "negative_prompt_ids": tokens(2, 25, seed=9)},
        {"watermarking_config": transformers.WatermarkingConfig(bias=2.5)},
        {"eos_token_id": list(range(2, 30)), "pad_token_id": 0},
    ],
    ids=["beams", "allowed tokens", "several texts a prompt", "guidance", "watermark", "rows that end"],
)
def test_an_option_says_the_same_with_a_cache(options: dict[str, Any]) -> None:
    cached, without = _without_a_cache(adapted(window=13, sinks=3), tokens(2, 30), **options)
    assert cached == without


def test_embeddings_for_a_prompt() -> None:
    model, ids = adapted(window=13, sinks=3), tokens(2, 30)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False), expected[:, 30:])


def test_a_cache_of_one_row_becomes_one_of_several() -> None:
    """A prompt that is read once, for several answers; without saying so another batch is refused."""
    model, ids = adapted(window=13, sinks=3), tokens(1, 30)
    cache = model(ids).past_key_values
    several = torch.cat([ids.expand(3, -1), tokens(3, 4, seed=1)], dim=1)
    with pytest.raises(AHNError, match="holds 1 sequences, the input has 3"):
        model.generate(several, past_key_values=cache, max_new_tokens=6)
    cache.batch_repeat_interleave(3)
    expected = model.generate(several, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(several, past_key_values=cache, max_new_tokens=6, do_sample=False), expected)


@torch.no_grad()
def test_candidates_are_tried_side_by_side() -> None:
    """As contrastive search does: each row of the best tokens, of which one goes on."""
    model, ids = adapted(window=13, sinks=3), tokens(1, 30)
    output = model(ids, use_cache=True)
    for _ in range(5):
        candidates = output.logits[0, -1].topk(3).indices
        cache = output.past_key_values
        cache.batch_repeat_interleave(3)
        output = model(candidates[:, None], past_key_values=cache, output_hidden_states=True)
        chosen = output.hidden_states[-1].norm(dim=-1)[:, 0].argmax().view(1)
        cache.batch_select_indices(chosen)
        output.logits = output.logits[chosen]
        ids = torch.cat([ids, candidates[chosen][None]], dim=1)
    assert torch.allclose(output.logits[:, -1], model(ids, use_cache=False).logits[:, -1], atol=1e-4)


# -- a last token that is chosen again ---------------------------------------------------------------------------------


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    letters = [chr(97 + i) for i in range(26)]
    pieces = ["Ġ", *letters, "ab", "abc", "th", "the", "Ġa", "Ġt", "Ġth", "Ġthe"]
    pairs = [("a", "b"), ("ab", "c"), ("t", "h"), ("th", "e"), ("Ġ", "a"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    numbers = {piece: number for number, piece in enumerate(["<pad>", "<bos>", *pieces])}
    tokenizer = Tokenizer(BPE(numbers, pairs))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", padding_side="left"
    )


@pytest.mark.parametrize(
    "texts", [["the fox jumps over a lazy dog and runs ab"], ["the quick fox runs past ab", "xy t"]]
)
def test_token_healing(texts: list[str]) -> None:
    tokenizer = _tokenizer()
    given = dict(tokenizer(texts, return_tensors="pt", padding=True))
    ids, options = given.pop("input_ids"), {"token_healing": True, "tokenizer": tokenizer, "pad_token_id": 0} | given
    cached, without = _without_a_cache(adapted(window=13, sinks=3), ids, **options)
    assert cached == without
    assert (
        _without_a_cache(adapted(window=100, sinks=3), ids, **options)[0] == _without_a_cache(base(), ids, **options)[0]
    )


@pytest.mark.parametrize("missing", ["tokenizer", "pad_token", "bos_token"])
def test_token_healing_without_what_it_needs_is_refused(missing: str) -> None:
    tokenizer: Any = _tokenizer()
    if missing == "tokenizer":
        tokenizer = None
    else:
        setattr(tokenizer, missing, None)
    with pytest.raises(AHNError, match=r"token_healing needs tokenizer=, with a bos_token and a pad_token"):
        adapted(window=13, sinks=3).generate(tokens(1, 20), token_healing=True, tokenizer=tokenizer)

"""Models that see images: the text after an image, and the image's own tokens, leave the window like any others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error
from models import awaken, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache

TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention
IMAGE, BEGIN, END, COUNT = 150, 152, 153, 16
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 4096, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SIGHT = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1], "temporal_patch_size": 2,
}  # fmt: skip


def seeing() -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    numbers = {"image_token_id": IMAGE, "video_token_id": 151, "vision_start_token_id": BEGIN}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=SIGHT, vision_end_token_id=END, **numbers)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def prompt(more: Tensor | None = None) -> dict[str, Any]:
    """Text, an image of 8 · 8 patches, and text."""
    picture = torch.tensor([[BEGIN, *[IMAGE] * COUNT, END]])
    ids = torch.cat([tokens(1, 10), picture, tokens(1, 30, seed=2), *([] if more is None else [more])], dim=1)
    pixels = torch.randn(64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    grid = torch.tensor([[1, 8, 8]])
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


@torch.no_grad()
def test_images_within_the_window_are_the_bases() -> None:
    plain, given = seeing(), prompt()
    expected, text = plain(**given).logits, plain.generate(**given, max_new_tokens=6, do_sample=False)
    model = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=100, sinks=3)))
    assert torch.equal(model(**given).logits, expected)
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), text)
    with ahn.disabled(model):
        assert torch.equal(model(**given).logits, expected)


@torch.no_grad()
def test_images_that_leave_the_window() -> None:
    """Whole, with a cache, in a next turn and in steps: the same, whatever was read before."""
    model = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=13, sinks=3, prefill_chunk_size=5)))
    ids = tokens(1, 60)
    alone, whole = model(ids).logits, model(**prompt(), use_cache=False).logits
    assert relative_error(model(**prompt()).logits, whole) < TOLERANCE
    assert relative_error(model(ids).logits, alone) < TOLERANCE, "positions of another prompt's image"
    cache, more = AHNCache.for_model(model), tokens(1, 9, seed=5)
    model(**prompt(), past_key_values=cache)
    turn = torch.cat([model(part, past_key_values=cache).logits for part in more.split([4, 1, 1, 3], dim=1)], dim=1)
    assert relative_error(turn, model(**prompt(more), use_cache=False).logits[:, -9:]) < TOLERANCE
    found = model.generate(**prompt(), max_new_tokens=6, do_sample=False)
    logits = model(**prompt(found[:, -6:]), use_cache=False).logits
    assert torch.equal(logits[:, -7:-1].argmax(-1), found[:, -6:])


def test_a_kernel_for_the_base_reaches_what_sees() -> None:
    model = ahn.attach(seeing(), ahn.AHNConfig(window=13, sinks=3))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**prompt())
    ahn.detach(model)
    kernels = {config._attn_implementation for config in (model.config, model.config.vision_config)}
    assert kernels == {"eager"} and model.get_decoder().config._attn_implementation == "eager"


def test_a_model_that_makes_its_own_masks_is_refused() -> None:
    from support.architectures import build

    with pytest.raises(ahn.AHNError, match="Gemma3Model makes attention masks of its own"):
        ahn.attach(build("gemma3"), ahn.AHNConfig(window=9, sinks=2))


@torch.no_grad()
def test_a_model_that_sees_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=13, sinks=3)))
    model.save_pretrained(tmp_path)
    for found in (ahn.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert type(found) is type(model)
        assert torch.equal(found(**prompt()).logits, model(**prompt()).logits)

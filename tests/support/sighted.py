"""Tiny models that see images, and prompts with images for them."""

from __future__ import annotations

from typing import Any

import torch
from models import tokens
from torch import Tensor
from transformers import PreTrainedModel

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


KINDS = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}
LOCAL = 6
"""Tokens that a layer with a sliding window sees."""
GEMMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 200, "max_position_embeddings": 4096,
    "initializer_range": 0.2, "sliding_window": LOCAL, "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GEMMA_4 = {
    "global_head_dim": 16, "num_global_key_value_heads": 2, "vocab_size_per_layer_input": 200,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "use_bidirectional_attention": "vision",
}  # fmt: skip
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
POOLED = {"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 64}
PICTURE = torch.tensor([[BEGIN, *[IMAGE] * 4, END]])


def gemma(version: str, **changes: Any) -> PreTrainedModel:
    import transformers

    torch.manual_seed(0)
    if version == "gemma3":
        siglip = EYES | {"model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False}
        numbers = {"image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}
        config = transformers.Gemma3Config(
            text_config=GEMMA | changes, vision_config=siglip, mm_tokens_per_image=4, **numbers
        )
        return transformers.Gemma3ForConditionalGeneration(config).eval()
    numbers = {"image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END, "video_token_id": 155}
    given = {"text_config": GEMMA | GEMMA_4 | changes, "vision_config": EYES | POOLED, "audio_token_id": 156}
    return transformers.Gemma4ForConditionalGeneration(transformers.Gemma4Config(**given, **numbers)).eval()


def pictured(version: str, ids: Tensor | None = None) -> dict[str, Any]:
    """Text with two images in it, 60 tokens, or other ids with as many."""
    if ids is None:
        ids = torch.cat([tokens(1, 10), PICTURE, tokens(1, 30, seed=2), PICTURE, tokens(1, 8, seed=3)], dim=1)
    noise = torch.Generator().manual_seed(3)
    given = {"input_ids": ids, KINDS[version]: (ids == IMAGE).long()}
    if version == "gemma3":
        return given | {"pixel_values": torch.randn(2, 3, 16, 16, generator=noise)}
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None].repeat(2, 1, 1)
    return given | {"pixel_values": torch.rand(2, 16, 48, generator=noise), "image_position_ids": places}

"""The base model: a small Qwen3 of transformers, and the plain causal forward that trains and measures it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from .log import write_json
from .recipe import SEED, Recipe

MAX_POSITION = 32768


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A fresh float32 model; the projections that write to the residual stream start at zero."""
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=MAX_POSITION,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def hidden_states(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Final hidden states (B, L, D) of ids (B, L) with full attention.

    Layer by layer, so that layers can be compiled one by one; measuring (no gradients) takes them as they are.
    """
    decoder = model.model
    x = decoder.embed_tokens(ids)
    if torch.is_autocast_enabled(ids.device.type):
        x = x.to(torch.get_autocast_dtype(ids.device.type))
    angles = decoder.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in decoder.layers:
        run = layer if torch.is_grad_enabled() else layer.forward
        x = run(x, attention_mask=None, position_embeddings=angles)
    return decoder.norm(x)


def token_losses(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy (B, L) in nats of targets (B, L), float32."""
    logits = head(hidden).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and bfloat16 model.safetensors, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    config = model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    write_json(folder / "config.json", config)
    generation = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    write_json(folder / "generation_config.json", generation)

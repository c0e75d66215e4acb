"""Tiny checkpoints on disk for tests: base models, our adapters, and directories as the published trainer left them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ahn
from ahn.checkpoint import save_adapter

LAYERS, HEADS, KV_HEADS, HIDDEN, HEAD_DIM, VOCAB = 3, 4, 2, 32, 8, 61
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}
# What published configurations carry besides the model (docs/spec.md, section 7); the values are those of its trap.
LEFTOVERS = {
    "_layer_implementation": "Qwen2MemDecoderLayer",
    "sliding_window": 256,
    "sliding_window_type": "random",
    "ahn_position": "random",
    "use_normalized_l2": False,
    "loss_type": "kl",
    "dy_sliding_window": 2048,
    "dy_num_attn_sinks": 128,
}


def make_base(
    path: Path, family: str = "qwen2", shard: str = "5GB", dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """A random base model with the other files that real ones have."""
    config_class, model_class = FAMILIES[family]
    model_class(config_class(**SIZES | sizes)).to(dtype).save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text('{"model": "not read"}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def make_adapter(path: Path, base: Path, **settings: Any) -> Path:
    """An adapter with random weights, saved from a model."""
    model = attached(base, **settings)
    return save_adapter(model, path)


def attached(base: Path, **settings: Any) -> PreTrainedModel:
    """The base model with an AHN whose weights all matter: none is zero as after `attach`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    ahn.attach(model, ahn.AHNConfig(**{"window": 8, "sinks": 2} | settings))
    with torch.no_grad():
        for parameter in ahn.adapter_parameters(model).values():
            parameter.normal_(0, 0.3)
    return model.eval()


def publish(path: Path, **changes: Any) -> Path:
    """Rewrite the configuration of an adapter or merged directory as the published trainer writes it."""

    def rewrite(config: dict[str, Any]) -> None:
        config |= {name: config["ahn"][f"base_{name}"] for name in ("model_type", "architectures")}
        for name in ("ahn", "base_model_name_or_path", "layer_types", "use_ahn_router", "use_q_proj", "fa_layer_ids"):
            config.pop(name, None)
        config["torch_dtype"] = config.pop("dtype")
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config |= LEFTOVERS | changes
        for name in [name for name, value in config.items() if value is ...]:
            del config[name]

    return edit_config(path, rewrite)


def edit_config(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Change `config.json` in place."""
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of `model.safetensors` in place."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def all_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(found)
        found |= part
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bytes (NaN included)."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].view(-1).view(torch.uint8).equal(b[name].view(-1).view(torch.uint8))
        for name in a
    )


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = 40) -> Tensor:
    """Logits over tokens that are the same in every call; longer than window and sinks, so the memory is read."""
    ids = torch.arange(length).mul(7).remainder(VOCAB)[None]
    return model(ids).logits


def as_published(merged: Path) -> Path:
    """Shuffle a merged directory into mixed shards, as `save_pretrained` of the published model class would."""
    tensors = all_tensors(merged)
    for file in merged.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, merged / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::2], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    return publish(merged, use_ahn_router=True)

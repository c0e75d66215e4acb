"""Which bases turn keys so that it can be undone."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import ARCHITECTURES, base
from transformers import PreTrainedModel

from ahn.model.positions import rotates, rotation_of

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}


def made(name: str) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**SHAPE)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_keys_before_rope_are_what_the_projection_gave(architecture: str) -> None:
    """Undone at their own positions; where there is a rotation, it is the base model's."""
    model = base(architecture).double() if architecture != "gpt_oss" else base(architecture)
    attention = model.get_decoder().layers[0].self_attn
    rotation = rotation_of(model, attention)
    assert (rotation is None) == (architecture == "gemma3")
    if rotation is None:
        return
    found = {}

    def function(module, query, key, value, mask, **kwargs):
        found.setdefault("key", key)
        return value.repeat_interleave(2, 1).transpose(1, 2), None

    transformers.AttentionInterface.register("keys_only", function)
    before = {}
    name = "k_norm" if hasattr(attention, "k_norm") else "k_proj" if hasattr(attention, "k_proj") else "qkv_proj"
    getattr(attention, name).register_forward_hook(lambda module, args, output: before.setdefault("key", output))
    model.set_attn_implementation("keys_only")
    model(torch.arange(2, 50)[None])
    key = found["key"]
    expected = before["key"]
    if name == "qkv_proj":  # queries, keys and values in one
        expected = expected[..., 4 * key.shape[-1] : 6 * key.shape[-1]]
    if name != "k_norm" or architecture == "olmo2":
        expected = expected.unflatten(-1, (2, -1)).transpose(1, 2)
    expected = expected.transpose(1, 2) if expected.shape[1] != 2 else expected
    undone = rotation.undo(key, torch.arange(48)[None])
    assert torch.allclose(undone, expected.to(undone.dtype), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "known"),
    [("Llama", True), ("SmolLM3", True), ("Cohere2", False), ("Exaone4", False), ("HunYuanDenseV1", False)],
)
def test_models_with_ways_of_their_own(name: str, known: bool) -> None:
    """A wrong turn would be worse than none: it is not seen in any number but the loss."""
    model = made(name)
    layers = [layer.self_attn for layer in model.get_decoder().layers]
    assert (rotation_of(model, layers[-1]) is not None) == known
    if name == "SmolLM3":
        assert [rotates(layer) for layer in layers] == [True, True, True, False]

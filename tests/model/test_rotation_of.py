"""Which bases turn keys so that it can be undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from golden import relative_error
from models import ARCHITECTURES, awaken, base, tokens
from support.architectures import read
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import ahn
from ahn.cache import rows
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


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
MOVING = {
    "phi3": LONG | {"original_max_position_embeddings": 64, "rope_theta": 1e4},
    "llama": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize("architecture", MOVING)
@torch.no_grad()
def test_angles_that_depend_on_the_length_are_one_set_per_text(architecture: str) -> None:
    """A text beyond the switch is read in one piece, as the base reads it; one that crosses it in pieces is refused."""
    more = {"original_max_position_embeddings": 64} if architecture == "phi3" else {}
    positions = 256 if architecture == "phi3" else 64
    plain = base(architecture, max_position_embeddings=positions, rope_parameters=MOVING[architecture], **more)
    model = awaken(ahn.attach(plain, ahn.AHNConfig(window=13, sinks=3, prefill_chunk_size=8)))
    ids = tokens(1, 100)
    whole = model(ids, use_cache=False).logits
    assert relative_error(model(ids).logits, whole) < 1e-5
    assert relative_error(model(ids[:, :60]).logits, model(ids[:, :60], use_cache=False).logits) < 1e-5
    cache = ahn.AHNCache.for_model(model)
    model(ids[:, :60], past_key_values=cache)
    with pytest.raises(ahn.AHNError, match=r"more than 64 tokens .* read the whole text in one forward"):
        model(ids[:, 60:], past_key_values=cache)
    with pytest.raises(ahn.AHNError, match="60 were read before, and there may be 68"):
        model.generate(ids[:, :60], max_new_tokens=8)
    assert model.generate(ids, max_new_tokens=4).shape == (1, 104)


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "proportional": {"partial_rotary_factor": 0.5},
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
    | {"original_max_position_embeddings": 32},
}


def turned(kind: str, typed: bool) -> PreTrainedModel:
    """A base of 32 positions with this RoPE; `typed`: in its layers of full attention alone."""
    rope = KINDS[kind] | {"rope_type": kind, "rope_theta": 1e3}
    given = {"max_position_embeddings": 128 if kind == "longrope" else 32}
    if not typed:
        return base("llama", **given, rope_parameters=rope)
    default = {"rope_type": "default", "rope_theta": 1e3}
    return base("gemma3", **given, rope_parameters={"full_attention": rope, "sliding_attention": default})


def test_every_kind_of_rope_is_tried() -> None:
    assert KINDS.keys() == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("typed", [False, True])
@torch.no_grad()
def test_angles_are_those_of_the_text_and_not_of_what_was_read_before(kind: str, typed: bool) -> None:
    """transformers keeps the angles of `dynamic` and `longrope` in the module, as the last text has left them."""
    ids, longer = tokens(1, 50), tokens(1, 120, seed=1)
    model, fresh = (awaken(ahn.attach(turned(kind, typed), ahn.AHNConfig(window=9, sinks=2))) for _ in range(2))
    embedding = model.get_decoder().rotary_emb
    held = {name: (x, x.clone()) for name, x in embedding.named_buffers()}
    cache = ahn.AHNCache.for_model(model)
    read(model, ids[:, :40], [40], cache)
    forked = copy.deepcopy(cache)
    expected = read(fresh, ids, [40, *[1] * 10])
    assert torch.equal(read(model, ids[:, 40:], [1] * 10, cache), expected[:, 40:])
    model(longer)
    assert torch.equal(read(model, ids[:, 40:], [1] * 10, forked), expected[:, 40:])
    assert torch.equal(read(model, ids, [40, *[1] * 10]), expected)
    # No thread finds what another has put there.
    assert all(x is held[name][0] and torch.equal(*held[name]) for name, x in embedding.named_buffers())
    plain = turned(kind, typed)
    assert torch.equal(ahn.detach(model)(longer).logits, plain(longer).logits)
    assert "forward" not in vars(embedding)


@torch.no_grad()
def test_conversations_whose_angles_differ_are_not_joined() -> None:
    """Rows of a batch are turned by one set of angles, that of the longest."""
    model = ahn.attach(turned("longrope", False), ahn.AHNConfig(window=9, sinks=2))
    caches = [ahn.AHNCache.for_model(model) for _ in range(3)]
    for length, cache in zip((40, 20, 10), caches, strict=True):
        read(model, tokens(1, length), [length], cache)
    assert rows.lengths(rows.join(caches[1:])) == [20, 10]
    with pytest.raises(ahn.AHNError, match="more than 32 tokens"):
        rows.join(caches)

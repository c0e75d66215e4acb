"""Turning to a position and back, as each kind of RoPE does it; and where anchors stand."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from ahn.layout.anchors import anchor_step
from ahn.layout.rotation import Rotation, anchors

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 10000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def made(kind: str) -> Rotation:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=ROPE[kind])
    embedding = modeling_llama.LlamaRotaryEmbedding(config)
    apply = sys.modules[modeling_llama.__name__].apply_rotary_pos_emb
    return Rotation(embedding, apply, float(embedding.attention_scaling))


@pytest.mark.parametrize("kind", ROPE)
def test_back_is_the_inverse(kind: str) -> None:
    rotation, x = made(kind), torch.randn(2, 3, 5, 16)
    positions = torch.tensor([[0, 1, 7, 200, 100_000], [3, 3, 9, 12, 70]])
    assert torch.allclose(rotation.undo(rotation.turn(x, positions), positions), x, atol=1e-5)


@pytest.mark.parametrize("kind", ROPE)
def test_turned_as_the_base_does(kind: str) -> None:
    rotation, x, positions = made(kind), torch.randn(1, 3, 5, 16), torch.arange(5)[None] + 11
    cos, sin = rotation.angles(x, positions)
    assert torch.equal(rotation.turn(x, positions), modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_each_head_at_its_own_positions() -> None:
    rotation, x = made("yarn"), torch.randn(2, 3, 4, 16)
    positions = torch.randint(0, 500, (2, 3, 4))
    turned = rotation.turn(x, positions)
    for head in range(3):
        assert torch.equal(turned[:, head : head + 1], rotation.turn(x[:, head : head + 1], positions[:, head]))


@pytest.mark.parametrize("reach", [16, 20, 100])
def test_no_query_sees_its_anchor_from_too_far(reach: int) -> None:
    positions = torch.arange(10 * reach)
    distance = positions - anchors(positions, reach)
    assert int(distance.max()) == reach - 1
    moved = positions >= reach
    assert int(distance[moved].min()) >= reach - anchor_step(reach)
    assert bool((anchors(positions, reach)[~moved] == 0).all())

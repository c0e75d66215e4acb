"""What a memory reads and writes by, where that is not the attention's own query and key.

Through the memory's own projection of the query (spec option `q_proj`), or before the rotary embedding (`content_keys`):
a rotation is undone exactly by the opposite one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from ahn.errors import AHNError
from ahn.memory import RecurrentMemory

if TYPE_CHECKING:
    from ahn.visibility import Visibility

Rope: TypeAlias = tuple[Tensor, Tensor]


def memory_query(
    module: nn.Module, memory: RecurrentMemory, x: Tensor, rope: Rope | None, count: int, content: bool
) -> Tensor:
    """The query of the last `count` tokens through the memory's own `q_proj`, (B, Hq, count, P); rotated or not."""
    assert memory.q_proj is not None
    query = memory.q_proj(_query_before_rope(module, x[:, -count:]))
    if content:
        return query
    cos, sin = (part[:, -count:] for part in _given(rope))
    return _own_rope(module)(query, query, cos, sin)[0]


def before_rope(module: nn.Module, x: Tensor, rope: Rope | None, scaling: float) -> Tensor:
    """x (B, H, m, P) as it was before the last m rotations of `rope`, (B or 1, ≥ m, P) cosines and sines.

    Args:
        scaling: what the rotary embedding multiplies its cosines and sines by.
    """
    m = x.shape[2]
    cos, sin = (part[:, -m:] / scaling**2 for part in _given(rope))
    return _own_rope(module)(x, x, cos.to(x.dtype), -sin.to(x.dtype))[0]


def evicted_rope(decoder: nn.Module, view: Visibility, position_ids: Tensor | None) -> Rope:
    """Cosines and sines (B or 1, m, P) with which the keys that leave the window were rotated when they entered it.

    Each of them leaves W positions after it came.
    """
    if position_ids is None:
        position_ids = torch.arange(view.seen, view.total, device=view.device)[None]
    embedding = decoder.get_input_embeddings().weight
    gone = position_ids[:, -view.evicted :] - view.window
    cos, sin = decoder.rotary_emb(embedding, gone.to(embedding.device))
    return cos, sin


def _given(rope: Rope | None) -> Rope:
    if rope is None:
        raise AHNError(
            "q_proj and content_keys need the model's rotary embedding, which this attention does not receive."
        )
    return rope


def _query_before_rope(module: nn.Module, x: Tensor) -> Tensor:
    """The base model's query of x (B, m, D) before its norm and RoPE: (B, Hq, m, P)."""
    # Phi-3 keeps q, k and v in one matrix, q first.
    query = module.q_proj(x) if hasattr(module, "q_proj") else module.qkv_proj(x)[..., : module.o_proj.in_features]
    # view, not unflatten: torch.compile cannot look into the latter.
    return query.view(*query.shape[:-1], -1, module.head_dim).transpose(1, 2)


def _own_rope(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    rope = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rope is None:
        raise AHNError(f"q_proj needs apply_rotary_pos_emb in {type(module).__module__}; use a config without q_proj.")
    return rope

"""The query that reads a memory through the memory's own projection (docs/spec.md, section 3)."""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

from ahn.errors import AHNError
from ahn.memory import RecurrentMemory

Rope: TypeAlias = tuple[Tensor, Tensor]


def memory_query(module: nn.Module, memory: RecurrentMemory, x: Tensor, rope: Rope | None, count: int) -> Tensor:
    """The query of the last `count` tokens through the memory's own `q_proj`, (B, Hq, count, P)."""
    assert memory.q_proj is not None
    query = memory.q_proj(_query_before_rope(module, x[:, -count:]))
    if rope is None:
        raise AHNError("q_proj needs the model's rotary embedding, which this attention does not receive.")
    cos, sin = (part[:, -count:] for part in rope)
    return _own_rope(module)(query, query, cos, sin)[0]


def _query_before_rope(module: Any, x: Tensor) -> Tensor:
    """The base model's query of x (B, m, D) before its norm and RoPE: (B, Hq, m, P)."""
    # Phi-3 keeps q, k and v in one matrix, q first.
    query = module.q_proj(x) if hasattr(module, "q_proj") else module.qkv_proj(x)[..., : module.o_proj.in_features]
    # view, not unflatten: torch.compile cannot look into the latter.
    return query.view(*query.shape[:-1], -1, module.head_dim).transpose(1, 2)


def _own_rope(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    rope = getattr(module, "ahn_rotation", None)  # compiled, see `ahn.decode.compiled`
    rope = rope or getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rope is None:
        raise AHNError(f"q_proj needs apply_rotary_pos_emb in {type(module).__module__}; use a config without q_proj.")
    return rope

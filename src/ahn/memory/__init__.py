"""Recurrent memories. One file is one memory: a new file with a `Memory` subclass is found by itself."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import torch

from ahn.errors import AHNError
from ahn.memory.base import Memory, RecurrentMemory
from ahn.memory.key_basis import KeyBasis
from ahn.memory.registry import baselines, by_published_name, get, names, recurrent
from ahn.shape import DEFAULT_SLOTS, ModelShape

if TYPE_CHECKING:
    from ahn.config import AHNConfig

__all__ = [
    "Memory",
    "RecurrentMemory",
    "baselines",
    "by_published_name",
    "get",
    "make",
    "names",
    "recurrent",
    "slot_count",
    "window_within",
]


def make(config: AHNConfig, shape: ModelShape, layer: int = 0) -> Memory:
    """A new memory for a layer of a model of this shape."""
    kind = get(config.memory)
    sizes = shape.hidden_size, shape.heads, shape.head_dim, shape.kv_heads
    made = kind(
        *sizes,
        q_proj=config.q_proj,
        slots=config.slots,
        bits=config.tier_bits,
        passage=config.passage,
        **of_layer(config, layer),
    )
    if config.calibrated_keys:
        made.key_basis = KeyBasis(shape.kv_heads, shape.head_dim)
    return made


def of_layer(config: AHNConfig, layer: int) -> dict[str, Any]:
    """What a layer's memory has that another layer's may not: which heads keep tokens, and by whose scores."""
    if not get(config.memory).keeps_tokens:
        return {}
    scores = "own" if config.score_layer is None else "made" if layer == config.score_layer else "given"
    return {"slot_heads": config.heads_of(layer), "scores": scores}


def slot_count(name: str, window: int, slots: int = DEFAULT_SLOTS) -> int:
    """Keys per layer that attention sees besides sinks and window with the memory called `name`.

    Args:
        window: tokens before one reaches the memory: quantized ones count.
        slots: `AHNConfig.slots`.
    """
    with torch.device("meta"):
        return get(name)(hidden_size=1, heads=1, head_dim=1, slots=slots).slot_count(window)


def window_within(name: str, keys: int, quantized: int = 0) -> int:
    """The widest window that fits into `keys` exact keys together with the slots of a memory without parameters.

    What a trained memory holds, tokens too, is its state: methods with one are compared by the bytes of all they hold.

    Args:
        quantized: tokens between window and memory: no exact keys, but the memory may have more slots for them.

    Raises:
        AHNError: there is no room for a window of one token.
    """
    with torch.device("meta"):
        kind = get(name)
        taken = kind(hidden_size=1, heads=1, head_dim=1).slot_count
    if kind.published_name is not None:
        return keys
    window = bisect.bisect_right(range(1, keys + 1), keys, key=lambda window: window + taken(window + quantized))
    if window < 1:
        raise AHNError(f"A window of {keys} tokens has no room for the slots of {name}: choose a larger one.")
    return window

"""Layers of a cache that have no memory: transformers' own, for attention (keys, values) and for linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ahn.errors import AHNError

_STATES = ("conv_states", "recurrent_states")
"""Of a layer with linear attention: dictionaries from numbers to tensors, None where there is none yet."""


def tensors(layer: Any, index: int) -> dict[str, Tensor]:
    """All tensors of a layer by name; none before the first forward.

    Raises:
        AHNError: the layer keeps something else.
    """
    named = _states(layer)
    if getattr(layer, "is_initialized", False):
        if getattr(layer, "keys", None) is None:
            raise AHNError(f"Layer {index} keeps a {type(layer).__name__}, which cannot be saved.")
        named |= {"keys": layer.keys, "values": layer.values}
    return named


def load(layer: Any, named: dict[str, Tensor], seen: int) -> None:
    """The inverse of `tensors`, for a layer that has read nothing yet."""
    for name, x in named.items():
        kind, _, number = name.partition(".")
        if kind == "conv_states":
            layer.update_conv_state(x, state_idx=int(number))
        elif kind == "recurrent_states":
            layer.update_recurrent_state(x, state_idx=int(number))
    if "keys" in named:
        layer.lazy_initialization(named["keys"], named["values"])
        layer.keys, layer.values = named["keys"], named["values"]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = seen


def move(layer: Any, device: torch.device | str) -> None:
    """Move every tensor of a layer to a device."""
    for name in _states(layer):
        kind, _, number = name.partition(".")
        states = getattr(layer, kind)
        states[int(number)] = states[int(number)].to(device)
    if getattr(layer, "is_initialized", False):
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def _states(layer: Any) -> dict[str, Tensor]:
    found = {f"{kind}.{i}": x for kind in _STATES for i, x in getattr(layer, kind, {}).items()}
    return {name: x for name, x in found.items() if x is not None}

"""Layers of a cache that have no memory: transformers' own, for attention (keys, values) and for linear attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

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
        if name.partition(".")[0] in _STATES:
            _set_state(layer, name, x)
    if "keys" in named:
        _set_keys(layer, named["keys"], named["values"], seen)


def move(layer: Any, device: torch.device | str) -> None:
    """Move every tensor of a layer to a device."""
    for name in _states(layer):
        kind, _, number = name.partition(".")
        states = getattr(layer, kind)
        states[int(number)] = states[int(number)].to(device)
    if getattr(layer, "is_initialized", False):
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def settle(layer: Any, recorded: int) -> None:
    """Before a forward: of what a sliding layer holds beyond its window, only the last tokens may be taken out again.

    transformers' own `crop` leaves no more than the window, whatever was recorded: a second one in a row would take
    tokens out of that.
    """
    if _slides(layer):
        first = max(0, layer.keys.shape[2] - (layer.sliding_window - 1 + recorded))
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]


def check_crop(layer: Any, index: int, columns: int) -> None:
    """Raises AHNError unless a layer can take out its last columns; changes nothing."""
    if not columns:
        return
    if not layer.is_croppable:
        raise AHNError(f"Nothing can be taken out of layer {index} again: linear attention keeps one state.")
    if _slides(layer):
        left, seen = layer.keys.shape[2] - columns, layer.cumulative_length - columns
        if left < min(seen, layer.sliding_window - 1):
            raise AHNError(
                f"Cannot crop {columns} tokens: layer {index} sees the last {layer.sliding_window} tokens and holds no "
                "earlier ones. Keep a copy (copy.deepcopy(cache)) to go back to, or call "
                "cache.activate_past_recording() before what may have to be taken out is read."
            )


def crop(layer: Any, columns: int) -> None:
    """Forget the last columns."""
    if _slides(layer):
        last = max(0, layer.keys.shape[2] - columns)
        layer.keys, layer.values = layer.keys[:, :, :last], layer.values[:, :, :last]
        layer.cumulative_length = max(0, layer.cumulative_length - columns)
    else:
        layer.crop(-columns)


def _slides(layer: Any) -> bool:
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized


def join(layer: Any, rows: Sequence[Any], seen: int) -> None:
    """Make an empty layer of the rows of several, with zeros before the shorter ones, as after `seen` columns."""
    for name, x in _states(rows[0]).items():
        _set_state(layer, name, torch.cat([x, *(_states(row)[name] for row in rows[1:])]))
    if getattr(rows[0], "is_initialized", False) and getattr(rows[0], "keys", None) is not None:
        width = min(seen, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else seen
        keys, values = (torch.cat([_wide(getattr(row, kind), width) for row in rows]) for kind in ("keys", "values"))
        _set_keys(layer, keys, values, seen)


def take(source: Any, layer: Any, row: int, length: int) -> None:
    """Make an empty layer of one row of another, of which `length` tokens are real."""
    for name, x in _states(source).items():
        _set_state(layer, name, x[row : row + 1].clone())
    if getattr(source, "is_initialized", False) and getattr(source, "keys", None) is not None:
        held = max(0, source.keys.shape[2] - length)
        keys, values = (x[row : row + 1, :, held:].clone() for x in (source.keys, source.values))
        _set_keys(layer, keys, values, length)


def _wide(x: Tensor, width: int) -> Tensor:
    """The last columns of keys or values (B, H, T, P), so many, with zeros before them where there are fewer."""
    return F.pad(x, (0, 0, width - x.shape[2], 0))  # negative: cut off


def _set_state(layer: Any, name: str, x: Tensor) -> None:
    kind, _, number = name.partition(".")
    update = layer.update_conv_state if kind == "conv_states" else layer.update_recurrent_state
    update(x, state_idx=int(number))


def _set_keys(layer: Any, keys: Tensor, values: Tensor, seen: int) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = seen


def _states(layer: Any) -> dict[str, Tensor]:
    found = {f"{kind}.{i}": x for kind in _STATES for i, x in getattr(layer, kind, {}).items()}
    return {name: x for name, x in found.items() if x is not None}

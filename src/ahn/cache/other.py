"""Layers of a cache that have no memory: transformers' own, for attention (keys, values) and for linear attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ahn import private
from ahn.cache.layer import AHNLayer
from ahn.errors import AHNError
from ahn.layout.state import Change
from ahn.wrappers import decoder_of

_STATES = ("conv_states", "recurrent_states")
"""Of a layer with linear attention: dictionaries from numbers to tensors, None where there is none yet."""
ONE_STATE = (
    "Nothing can be taken out of this conversation again: the base's recurrent layers keep one state. Keep a copy "
    "(copy.deepcopy(cache)) to go back to."
)


def tensors(layer: Any, index: int) -> dict[str, Tensor]:
    """All tensors of any layer by name; none before the first forward.

    Raises:
        AHNError: the layer keeps something else.
    """
    if isinstance(layer, AHNLayer):
        return layer.tensors()
    named = states(layer)
    if _attends(layer):
        if getattr(layer, "keys", None) is None:
            raise AHNError(f"Layer {index} keeps a {type(layer).__name__}, which cannot be saved.")
        named |= {"keys": layer.keys, "values": layer.values}
    return named


def _attends(layer: Any) -> bool:
    """Whether a layer has read keys and values: one in whose place the base has an MLP never does."""
    return isinstance(layer, CacheLayerMixin) and layer.is_initialized


def load(layer: Any, named: dict[str, Tensor], seen: int) -> None:
    """The inverse of `tensors`, for a layer that has read nothing yet."""
    set_states(layer, named)
    if "keys" in named:
        _set_keys(layer, named["keys"], named["values"], seen)


def move(layer: Any, device: torch.device | str) -> None:
    """Move every tensor of any layer to a device."""
    if isinstance(layer, AHNLayer):
        layer.to(device)
        return
    map_states(layer, lambda x: x.to(device))
    if _attends(layer):
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def follow(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Before new keys and values: have those that are kept in their dtypes (autocast began, or the model was cast)."""
    if _attends(layer) and getattr(layer, "keys", None) is not None:
        layer.keys, layer.values = layer.keys.to(keys.dtype), layer.values.to(values.dtype)


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
        raise AHNError(ONE_STATE)
    if _slides(layer):
        left, seen = layer.keys.shape[2] - columns, layer.cumulative_length - columns
        if left < min(seen, layer.sliding_window - 1):
            raise AHNError(
                f"Cannot crop {columns} tokens: layer {index} sees the last {layer.sliding_window} tokens and holds no "
                "earlier ones. Keep a copy (copy.deepcopy(cache)) to go back to, or call "
                "cache.activate_past_recording() before what may have to be taken out is read."
            )


def forget(layer: Any) -> None:
    """After a layer's own `reset`, which may have left zeros in as many rows, and columns, as there were."""
    if recurs(layer):
        clear_states(layer)
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False


def repeat_rows(layer: Any, repeats: int) -> None:
    """Of any layer; transformers' own have no such method for recurrent states."""
    if isinstance(layer, CacheLayerMixin):
        layer.batch_repeat_interleave(repeats)
    if not isinstance(layer, AHNLayer):
        map_states(layer, lambda x: x.repeat_interleave(repeats, dim=0))


def select_rows(layer: Any, indices: Tensor) -> None:
    """Of any layer, as `repeat_rows`."""
    if isinstance(layer, CacheLayerMixin):
        layer.batch_select_indices(indices)
    if not isinstance(layer, AHNLayer):
        map_states(layer, lambda x: x[indices.to(x.device)])


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
    join_states(layer, rows)
    if _attends(rows[0]) and getattr(rows[0], "keys", None) is not None:
        width = min(seen, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else seen
        keys, values = (torch.cat([_wide(getattr(row, kind), width) for row in rows]) for kind in ("keys", "values"))
        _set_keys(layer, keys, values, seen)


def take(source: Any, layer: Any, row: int, length: int) -> None:
    """Make an empty layer of one row of another, of which `length` tokens are real."""
    take_states(source, layer, row)
    if _attends(source) and getattr(source, "keys", None) is not None:
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


# -- recurrent states, of layers that have nothing else and of those with attention beside them ------------------------


def recurs(layer: Any) -> bool:
    """Whether a layer has recurrent states, alone or beside its attention."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def states(layer: Any) -> dict[str, Tensor]:
    """Recurrent states by name; none before the first forward, or where the layer has no recurrence."""
    found = {f"{kind}.{i}": x for kind in _STATES for i, x in getattr(layer, kind, {}).items()}
    return {name: x for name, x in found.items() if x is not None}


def set_states(layer: Any, named: dict[str, Tensor]) -> None:
    """Give a layer that has read nothing yet the recurrent states among these tensors."""
    for name, x in named.items():
        if name.partition(".")[0] in _STATES:
            _set_state(layer, name, x)


def map_states(layer: Any, change: Change) -> None:
    """Each recurrent state changed in the same way."""
    for name, x in states(layer).items():
        kind, _, number = name.partition(".")
        getattr(layer, kind)[int(number)] = change(x)


def clear_states(layer: Any) -> None:
    """Forget the recurrent states; transformers' own `reset` leaves zeros in as many rows as there were."""
    LinearAttentionCacheLayerMixin.__init__(layer, layer.number_of_states)


def bring_states(layers: Sequence[Any], model: PreTrainedModel, before: torch.dtype) -> None:
    """Before a forward: let recurrent states be where a model computes, and such that it can change them in place.

    Args:
        before: what it computed in when it read last. A convolution sees its state beside new tokens, in what it
            computes in now.
    """
    for layer, module in zip(layers, decoder_of(model).layers, strict=True):
        if not recurs(layer):
            continue
        weights = (part for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
        device = private.execution_device(next(weights))
        map_states(layer, functools.partial(_brought, device=device))
        autocast = torch.is_autocast_enabled(device.type)
        now = torch.get_autocast_dtype(device.type) if autocast else model.dtype
        for place, x in layer.conv_states.items():
            if x is not None and x.dtype == before:
                layer.conv_states[place] = x.to(now)


def _brought(x: Tensor, device: torch.device) -> Tensor:
    """On a device; a tensor made under `torch.inference_mode` cannot be written outside of it."""
    x = x.to(device)
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def join_states(layer: Any, rows: Sequence[Any]) -> None:
    """Give an empty layer the recurrent states of several."""
    for name, x in states(rows[0]).items():
        _set_state(layer, name, torch.cat([x, *(states(row)[name] for row in rows[1:])]))


def take_states(source: Any, layer: Any, row: int) -> None:
    """Give an empty layer the recurrent states of one row of another."""
    set_states(layer, {name: x[row : row + 1].clone() for name, x in states(source).items()})

"""Rows of caches: conversations that were read apart go on in one batch, and apart again.

A batch lies in fixed slots, so that rows of any length stand side by side. The shorter ones have leading padding; so
that none of them is at the edge of its first window in columns, there is always more of it than window and sinks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ahn import private
from ahn.cache import other, tier, waiting
from ahn.cache.conversation import AHNCache
from ahn.cache.layer import AHNLayer
from ahn.cache.transfer import Transfer
from ahn.errors import AHNError
from ahn.layout.slots import Placed, Slots, gather
from ahn.layout.state import LayerState, Tensors
from ahn.layout.visibility import Padding
from ahn.memory.base import Memory
from ahn.wrappers import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINKS = "sinks"
"""Among the parts of a state: `LayerState.sinks`, which a file does not tell from the window."""


def join(caches: Sequence[AHNCache]) -> AHNCache:
    """One cache with the rows of all of them, in order; they stay as they are, but for how they lie.

    The next step needs `position_ids`: as many for each row as it has read (`lengths`). Where some layers have no
    memory, it needs an `attention_mask` too (`mask`).

    Raises:
        AHNError: a cache has read nothing, or they were made with different models or settings.
    """
    model = _model_of(caches)
    lengths = torch.cat([_lengths(cache) for cache in caches])
    seen = max(int(lengths.max()), caches[0].config.lossless + 1)
    joined = _like(caches[0], model)
    in_slots = [_InSlots(cache, model) for cache in caches]
    needs_sinks = {i for cache in caches for i, layer in cache.memory_layers.items() if _state(layer).sinks is not None}
    for index, layer in enumerate(joined.layers):
        rows = [cache.layers[index] for cache in caches]
        if isinstance(layer, AHNLayer):
            parts = [own.parts(index, index in needs_sinks) for own in in_slots]
            layer.state = _from_parts({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            other.join_states(layer, rows)
        else:
            other.join(layer, rows, seen)
    joined.rows = len(lengths)
    anchors = [anchor for cache in caches for anchor in _anchors(cache)]
    _set_progress(joined, seen, lengths, anchors)
    return joined


def take(batch: AHNCache, row: int, device: torch.device) -> AHNCache:
    """A copy of one row on a device as a conversation of its own, as if it had always been alone."""
    model, length, anchor = _model_of([batch]), lengths(batch)[row], _anchors(batch)[row]
    alone, slots = _like(batch, model), Slots(batch.config.window, batch.config.sinks)
    columns = slots.of_columns(length, torch.tensor([length], device=_lengths(batch).device))  # once for all tensors
    for index, layer in enumerate(alone.layers):
        if not isinstance(layer, AHNLayer):
            other.take(batch.layers[index], layer, row, length)
            continue
        parts = _parts(_state(_laid_in_slots(batch, index)))
        state = _from_parts({name: x[row : row + 1] for name, x in parts.items()})
        layer.state = _alone(state, batch, length, anchor, columns, _memory(model, index), device)
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        other.take_states(batch.layers[index], layer, row)
    alone.rows = 1
    alone.progress.seen, alone.progress.anchor = length, (anchor,)
    return alone


def reserve(like: AHNCache, rows: int) -> AHNCache:
    """A batch of rows that hold zeros and have read nothing, for `put`.

    Raises:
        AHNError: as `put`.
    """
    batch = join([like])
    _check_every_layer_has_memory(batch)
    for layer in batch.memory_layers.values():
        state = _state(layer)
        if like.config.reach and layer.rotates:
            state.sinks = state.window.keys[:, :, : like.config.sinks]
        layer.state = _from_parts({name: x.new_zeros(rows, *x.shape[1:]) for name, x in _parts(state).items()})
    batch.rows = rows
    set_read(batch, [0] * rows, [0] * rows)
    return batch


def put(batch: AHNCache, row: int, alone: AHNCache) -> None:
    """Write a conversation over one row of a batch, in place: captured steps know the batch's tensors.

    Raises:
        AHNError: as `join`; or a layer of the batch has no memory, and its size depends on what was read.
    """
    in_slots = _InSlots(alone, _model_of([batch, alone]))
    _check_every_layer_has_memory(batch)
    read, anchors = lengths(batch), list(_anchors(batch))  # before there is anything that a GPU would finish first
    read[row], anchors[row] = alone.seen, _anchors(alone)[0]
    for index in batch.memory_layers:
        state = _state(_laid_in_slots(batch, index))
        if state.sinks is None and _state(alone.layers[index]).sinks is not None:
            state.sinks = state.window.keys[:, :, : batch.config.sinks].clone()
        in_slots.write(index, {name: x[row : row + 1] for name, x in _parts(state).items()})
    in_slots.end()
    set_read(batch, read, anchors)


def lay(room: AHNCache, alone: AHNCache) -> None:
    """Write a conversation over one that `reserve` made for a single row, in place, as if that had always been it.

    Raises:
        AHNError: as `put`.
    """
    in_slots = _InSlots(alone, _model_of([room, alone]))
    for index in room.memory_layers:
        in_slots.write(index, _parts(_state(_laid_in_slots(room, index))))
    in_slots.end()
    room.progress.clear()
    room.progress.seen, room.progress.anchor = alone.seen, _anchors(alone)


def move(batch: AHNCache, source: int, target: int) -> None:
    """Write one row of a batch over another, in place."""
    for index in batch.memory_layers:
        for x in _parts(_state(_laid_in_slots(batch, index))).values():
            x[target].copy_(x[source])
    read, anchors = lengths(batch), list(_anchors(batch))
    read[target], anchors[target] = read[source], anchors[source]
    set_read(batch, read, anchors)


def prefix(batch: AHNCache, rows: int) -> AHNCache:
    """A batch of the first rows of another that `reserve` made: its tensors are views of the other's."""
    first = _like(batch, _model_of([batch]))
    for index, layer in first.memory_layers.items():
        layer.state = _from_parts({name: x[:rows] for name, x in _parts(_state(batch.layers[index])).items()})
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
    first.rows = rows
    set_read(first, lengths(batch)[:rows], _anchors(batch)[:rows])
    return first


def settle(batch: AHNCache, first: AHNCache) -> None:
    """Bring into a batch what its `prefix` has become in steps, which put new tensors in the place of some views."""
    for index, layer in batch.memory_layers.items():
        whole, own = _parts(_state(layer)), _parts(_state(_laid_in_slots(first, index)))
        for name, x in own.items():
            if x.data_ptr() != whole[name].data_ptr():
                whole[name][: len(x)].copy_(x)
    rows = row_count(first)
    read, anchors = lengths(batch), list(_anchors(batch))
    read[:rows], anchors[:rows] = lengths(first), _anchors(first)
    set_read(batch, read, anchors)


def refresh(batch: AHNCache, first: AHNCache) -> None:
    """Give a `prefix` of a batch its views again, where steps have put other tensors in their place.

    The others stay the very tensors that a captured step knows.
    """
    count = row_count(first)
    for index, layer in first.memory_layers.items():
        whole, own = _parts(_state(batch.layers[index])), _parts(_state(_laid_in_slots(first, index)))
        same = {name for name, x in whole.items() if name in own and own[name].data_ptr() == x.data_ptr()}
        layer.state = _from_parts({name: own[name] if name in same else x[:count] for name, x in whole.items()})
    first.progress.anchor = _anchors(batch)[:count]


def row_count(batch: AHNCache) -> int:
    """B."""
    return len(next(iter(batch.memory_layers.values())).keys)


def set_read(batch: AHNCache, read: Sequence[int], anchors: Sequence[int] | None = None) -> None:
    """Say how many real tokens each row has read, and how far its sinks are moved along (as they are, by default)."""
    device = next(iter(batch.memory_layers.values())).keys.device
    seen = max(*read, batch.config.lossless + 1)
    _set_progress(batch, seen, torch.tensor(read, device=device), _anchors(batch) if anchors is None else anchors)


def _check_every_layer_has_memory(batch: AHNCache) -> None:
    if len(batch.memory_layers) != len(batch.layers) or batch.recurrent:
        raise AHNError("Rows of a batch can be replaced only where every layer has a memory and nothing else.")


def copied(cache: AHNCache, device: torch.device) -> AHNCache:
    """A copy of a conversation of one row on a device, without going through a copy where it is now."""
    new = _like(cache, _model_of([cache]))
    with Transfer(device) as transfer:
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, AHNLayer):
                own: AHNLayer = new.layers[index]
                own.state = _state(layer).map(transfer.copy)
                own.dtype, own.device = own.keys.dtype, own.keys.device
                other.set_states(own, {name: x.to(device) for name, x in other.states(layer).items()})
            else:
                new.layers[index] = copy.deepcopy(layer)
                other.move(new.layers[index], device)
    new.rows, new.messages = 1, list(cache.messages)
    new.progress.seen, new.progress.anchor = cache.seen, cache.progress.anchor
    return new


def lengths(batch: AHNCache) -> list[int]:
    """Real tokens that each row has read."""
    return [int(length) for length in _lengths(batch).tolist()]


def mask(batch: AHNCache) -> Tensor | None:
    """(B, columns + 1) the attention mask of a step in which every row reads a token; None where none is needed."""
    if len(batch.memory_layers) == len(batch.layers):
        return None
    read = _lengths(batch)
    columns = torch.arange(batch.seen + 1, device=read.device)
    return (columns >= batch.seen - read[:, None]).long()


def _model_of(caches: Sequence[AHNCache]) -> PreTrainedModel:
    """The one model of all caches."""
    models = [cache.model for cache in caches]
    first = models[0]
    if first is None or any(model is not first for model in models):
        raise AHNError("Conversations of different models, or of one that is gone, cannot be in one batch.")
    if any(cache.config != caches[0].config for cache in caches):
        raise AHNError("Conversations with different windows, sinks or memories cannot be in one batch.")
    if any(cache.seen == 0 for cache in caches):
        raise AHNError("A conversation that has read nothing cannot be in a batch.")
    if any(cache.in_parts for cache in caches):
        raise AHNError(
            "A conversation with tokens that wait to be taken out cannot be in a batch; read one more before."
        )
    steady: int | None = first._ahn.steady
    if len(caches) > 1 and steady is not None and max(x for cache in caches for x in lengths(cache)) > steady:
        raise AHNError(
            f"A conversation of more than {steady} tokens cannot be in one batch with others: this base turns keys "
            "otherwise in longer texts (RoPE of the type longrope or dynamic)."
        )
    for cache in caches:
        waiting.leave_slots(cache)
    return first


def _like(cache: AHNCache, model: PreTrainedModel) -> AHNCache:
    """An empty cache with the same settings."""
    new = AHNCache.for_model(model)
    new.config = cache.config
    for layer in new.memory_layers.values():
        layer.config = cache.config
    return new


def _lengths(cache: AHNCache) -> Tensor:
    """(B,) real tokens of each row, where the first layer is."""
    keys = next(iter(cache.memory_layers.values())).keys
    read = cache.progress.row_lengths()
    return read.to(keys.device).expand(len(keys)) if len(read) != len(keys) or read.device != keys.device else read


def _anchors(cache: AHNCache) -> tuple[int, ...]:
    """Of each row; see `Progress.anchor`."""
    anchor, rows = cache.progress.anchor, row_count(cache)
    return anchor if len(anchor) == rows else anchor * rows


def _set_progress(cache: AHNCache, seen: int, read: Tensor, anchors: Sequence[int]) -> None:
    leading, progress = seen - read, cache.progress
    none = torch.zeros_like(leading)
    progress.seen, progress.lengths = seen, read
    progress.padding = Padding(leading, none.bool(), none) if bool(leading.any()) else None
    progress.anchor = tuple(anchors) if len(set(anchors)) > 1 else (anchors[0],)


def _memory(model: PreTrainedModel, index: int) -> Memory:
    memory: Memory = decoder_of(model).layers[index].ahn.fn
    return memory


def _state(layer: AHNLayer) -> LayerState:
    assert layer.state is not None
    return layer.state


def _laid_in_slots(batch: AHNCache, index: int) -> AHNLayer:
    """A layer of a batch; a step in which a tier begins has left the batch in columns."""
    layer: AHNLayer = batch.layers[index]
    if not layer.window.in_slots or layer.beside:
        layer.enter_slots(_lengths(batch))
    return layer


def _parts(state: LayerState) -> Tensors:
    """All tensors by name as they lie, the sinks that are kept beside the window on their own."""
    named = dataclasses.replace(state, sinks=None).tensors()
    return named if state.sinks is None else named | {SINKS: state.sinks}


def _from_parts(named: Tensors) -> LayerState:
    """The inverse of `_parts` for tokens in slots."""
    state = LayerState.from_tensors({name: x for name, x in named.items() if name != SINKS})
    state.window.in_slots, state.sinks = True, named.get(SINKS)
    return state


class _InSlots:
    """A conversation's layers as they lie in slots, with what a longer row of a batch has and this one not yet."""

    def __init__(self, cache: AHNCache, model: PreTrainedModel) -> None:
        self.cache, self.model = cache, model
        self._placed: dict[torch.device, Placed] = {}
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}

    def parts(self, index: int, with_sinks: bool) -> Tensors:
        """All tensors of a layer by name."""
        state = self._whole(index)
        if not state.window.in_slots:
            state.window = state.window.map(lambda x: self._way(x).of(x))
        if with_sinks and state.sinks is None:
            state.sinks = state.window.keys[:, :, : self.cache.config.sinks]
        return _parts(state)

    def write(self, index: int, row: Tensors) -> None:
        """Write a layer over the tensors (1, ...) of these names; those that are copied as they lie, at the `end`."""
        state = self._whole(index)
        named, to_lay = _parts(state), {} if state.window.in_slots else _parts(LayerState(state.window))
        if SINKS in row and state.sinks is None:
            named[SINKS] = (row if to_lay else named)["keys"][:, :, : self.cache.config.sinks]
        for name, target in row.items():
            if (x := to_lay.get(name)) is not None:
                self._way(x).into(x, target)
            else:
                targets, sources = self._copies.setdefault((target.device, target.dtype), ([], []))
                targets.append(target)
                sources.append(named[name])

    def end(self) -> None:
        """Copy what `write` has left: all layers at once, as each copy alone would cost a host as much as all."""
        for targets, sources in self._copies.values():
            private.copy_all(targets, sources)

    def _whole(self, index: int) -> LayerState:
        """A layer's state as it lies; sinks on their own only where they are kept so."""
        config, state = self.cache.config, _state(self.cache.layers[index])
        low_bit, held = state.tier, state.memory
        if config.quantized and low_bit is None:
            low_bit = tier.empty(config.quantized, state.window, config.tier_bits)
        if not held:
            keys, memory = state.window.keys, _memory(self.model, index)
            held = memory.init_state(len(keys), keys.device)
            held = held | memory.empty_slots(keys, config.window + config.quantized)
        return LayerState(state.window, low_bit, held, state.sinks)

    def _way(self, x: Tensor) -> Placed:
        if x.device not in self._placed:
            slots, cache = Slots(self.cache.config.window, self.cache.config.sinks), self.cache
            lengths = cache.progress.row_lengths()  # without padding the host knows them
            full = lengths.device.type == "cpu" and bool((lengths >= cache.config.lossless).all())
            self._placed[x.device] = slots.placed(cache.seen, lengths, x.device, full)
        return self._placed[x.device]


def _alone(
    state: LayerState, batch: AHNCache, length: int, anchor: int, columns: Tensor, memory: Memory, device: torch.device
) -> LayerState:
    """A copy of a row's state in columns, without what it has only for its neighbours' sake."""
    config, keys = batch.config, state.window.keys
    if columns.device != keys.device:  # a model may be spread over several
        columns = columns.to(keys.device)

    def copied_to(x: Tensor) -> Tensor:
        return x.to(device, copy=True)

    window = state.window.map(lambda x: gather(x, columns).to(device))
    window.in_slots = False
    low_bit = state.tier.map(copied_to) if state.tier is not None and length > config.lossless else None
    written = length > config.lossless + config.quantized
    held = state.memory if written else memory.init_state(1, keys.device)
    sinks = copied_to(state.sinks) if anchor and state.sinks is not None else None
    return LayerState(window, low_bit, {name: copied_to(x) for name, x in held.items()}, sinks)

"""One layer's part of an `AHNCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ahn.cache import sinks
from ahn.cache.progress import Progress
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.layout.copies import join
from ahn.layout.rotation import Rotation
from ahn.layout.slots import Slots
from ahn.layout.state import Change, LayerState, Tensors, TierState, WindowState
from ahn.layout.visibility import Visibility


class AHNLayer(CacheLayerMixin):
    """Holds a layer's state and takes it through one forward after the other.

    Attributes:
        rotates: whether the base turns this layer's keys by their positions.
        state: None before the first forward.
        progress: of the conversation; the layers of a cache share it.
        visibility: of a forward that has begun and that this layer has not finished.
        under_way: new tokens were taken, but their forward is not over.
    """

    is_sliding = False

    def __init__(self, config: AHNConfig, progress: Progress | None = None, rotates: bool = True) -> None:
        # Not the base class's own: there, keys and values are attributes.
        self.config, self.progress, self.rotates = config, progress or Progress(), rotates
        self.reset()

    def reset(self) -> None:
        self.state: LayerState | None = None
        self.visibility: Visibility | None = None
        self.under_way = False
        self._replaced: tuple[Tensor, Tensor] | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` will do for what is read once it records; transformers asks before it guesses tokens.

        On Apple's GPUs it asks in every `generate`, to read one token more than the text has and take it out again,
        which costs a copy of the window per token, and padded rows cannot.
        """
        on_mps = self.state is not None and self.window.keys.device.type == "mps"
        return self.progress.recording or not on_mps

    def activate_past_recording(self) -> None:
        """From now on `crop` can take out what is read; see `AHNCache.activate_past_recording`."""
        self.record_past = True

    @property
    def record_past(self) -> bool:
        """Whether it can, as transformers calls it; of the whole conversation."""
        return self.progress.recording

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self.progress.recording = recording

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def window(self) -> WindowState:
        """The exact part of the state, which must be there."""
        assert self.state is not None
        return self.state.window

    @property
    def keys(self) -> Any:
        """Keys of the window, None before the first forward: what transformers asks a layer for."""
        return None if self.state is None else self.state.window.keys

    @property
    def values(self) -> Any:
        """Values of the window; see `keys`."""
        return None if self.state is None else self.state.window.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.state = LayerState(WindowState(key_states[:, :, :0], value_states[:, :, :0]))

    # -- one forward: update (called by the base model's attention), then evict, then keep -------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values (B, Hkv, n, P); return all that the queries may see, before anything leaves."""
        view = self.visibility
        if view is None or view.seen != self.progress.seen or view.length != key_states.shape[2]:
            raise AHNError(
                "An AHNCache works only with the model it was made for, with its adapter enabled; "
                "inside ahn.disabled(model) pass another cache or none."
            )
        self.under_way = True
        self.visibility = view = view.on(key_states.device)
        if self.state is None:
            self.lazy_initialization(key_states, value_states)
        elif (self.keys.dtype, self.values.dtype) != (key_states.dtype, value_states.dtype):
            self.state = self.state.like(key_states, value_states)  # autocast began or ended, or the model was cast
        self.place_sinks(view.anchor, view.rotation)
        if not view.in_slots:
            self.leave_slots()
            keys, values = join([self.keys, key_states]), join([self.values, value_states])
            return (keys, values) if view.in_columns else (view.align(keys), view.align(values))
        self.enter_slots(view.lengths_before)
        self.own_memory()
        window = self.window
        self._replaced = (_take(window.keys, view.new_slot), _take(window.values, view.new_slot))
        _put(window.keys, view.new_slot, key_states.detach())
        _put(window.values, view.new_slot, value_states.detach())
        return window.keys, window.values

    def take(self, keys: Tensor, values: Tensor, gates: Tensors) -> None:
        """Before a forward in parts: let the window hold the new tokens too, as `update` returned them."""
        window = self.window
        gates = {name: gate.to(keys.dtype) for name, gate in gates.items()}
        if window.gates:
            gates = {name: torch.cat([window.gates[name], new], dim=2) for name, new in gates.items()}
        assert self.state is not None
        self.state.window = WindowState(keys.detach(), values.detach(), gates)
        self.visibility = None

    def evict(self, keys: Tensor, values: Tensor, gates: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        """Keep sinks and window, return what left.

        Args:
            keys, values: what `update` returned.
            gates: of the new tokens (B, Hw, n, ...).

        Returns:
            keys and values (B, Hkv, m, P) and gates (B, Hw, m, ...) of the evicted tokens.
        """
        view, window = self.visibility, self.window
        assert view is not None and self.state is not None
        self.visibility = None
        if self._replaced is not None:
            (key, value), self._replaced = self._replaced, None
            evicted = {name: _take(pending, view.new_slot).float() for name, pending in window.gates.items()}
            for name, pending in window.gates.items():
                _put(pending, view.new_slot, gates[name].detach())
            return key, value, evicted
        gates = {name: gate.to(keys.dtype) for name, gate in gates.items()}
        if window.gates:
            gates = {name: view.align(torch.cat([window.gates[name], new], dim=2)) for name, new in gates.items()}
        self.state.window = WindowState(keys, values, gates).map(lambda x: view.keep(x).detach())
        return (
            view.evicted_slots(keys),
            view.evicted_slots(values),
            {name: view.evicted_slots(gate).float() for name, gate in gates.items()},
        )

    def keep(self, tier: TierState | None, memory: Tensors) -> None:
        """The state of tier and memory after the forward."""
        assert self.state is not None
        memory = {name: x.detach() for name, x in memory.items()}
        self.state = LayerState(self.window, tier, memory, self.state.sinks, self.state.beside)

    def place_sinks(self, anchor: tuple[int, ...], rotation: Rotation | None) -> None:
        """Move the keys of the sinks along, in place, to where the next queries see them.

        Args:
            anchor: how far, of each row or of all rows.
        """
        if anchor != self.progress.anchor and rotation is not None:
            sinks.move(self.with_moving_sinks(), self.progress.anchor, anchor, self.config.sinks, rotation)

    def with_moving_sinks(self) -> list[LayerState]:
        """Its state, if it has sinks that move along, ready to be written."""
        if self.state is None or not (self.config.sinks and self.rotates):
            return []
        self.own_memory()
        return [self.state]

    def enter_slots(self, lengths: Tensor) -> None:
        """Lay the window out in fixed slots; lengths (B or 1,) real tokens of each row before now."""
        if self.beside:
            self.leave_slots()
        if not self.window.in_slots:
            slots, seen = Slots(self.config.window, self.config.sinks), self.progress.seen
            self._lay_out(lambda x: slots.from_columns(x, seen, lengths), in_slots=True)

    def enter_slots_beside(self, places: int) -> None:
        """Lay the window of a single row out in slots, and what waits into so many places beside it, if not done."""
        assert self.state is not None
        waiting, slots = self.progress.waiting, Slots(self.config.window, self.config.sinks)
        window, first = self.window, self.progress.seen - waiting
        if not window.in_slots:
            held, read = min(first, self.config.lossless), torch.tensor([first])
            self._lay_out(lambda x: slots.from_columns(x[:, :, :held], first, read), in_slots=True)
            self.state.beside = window.map(lambda x: _padded(x[:, :, held:], places))
        elif self.state.beside is None:
            self.state.beside = window.map(lambda x: _padded(x[:, :, :0], places))

    @property
    def beside(self) -> int:
        """So many tokens lie beside the slots."""
        return 0 if self.state is None or self.state.beside is None else self.progress.beside

    def leave_slots(self) -> None:
        """Bring the window back into columns, with what lies beside it."""
        if not self.window.in_slots:
            return
        assert self.state is not None
        slots, seen, last = Slots(self.config.window, self.config.sinks), self.progress.seen, self.beside
        lengths, beside = self.progress.row_lengths() - last, self.state.beside
        self._lay_out(lambda x: slots.to_columns(x, seen - last, lengths.to(x.device)), in_slots=False)
        if last and beside is not None:
            window, beside = self.state.window, beside.map(lambda x: x[:, :, :last])
            gates = {name: torch.cat([gate, beside.gates[name]], dim=2) for name, gate in window.gates.items()}
            keys, values = (
                torch.cat(pair, dim=2) for pair in ((window.keys, beside.keys), (window.values, beside.values))
            )
            self.state.window = WindowState(keys, values, gates)

    def _lay_out(self, change: Change, in_slots: bool) -> None:
        assert self.state is not None
        self.state.window, self.state.beside = self.window.map(change), None
        self.state.window.in_slots = in_slots

    def own_memory(self) -> None:
        """Tensors made under `torch.inference_mode` cannot be written outside of it; copy them once."""
        if not torch.is_inference_mode_enabled():
            self.map(lambda x: x.clone() if x.is_inference() else x)

    # -- the whole layer at once -----------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """All tensors of this layer by the names of `LayerState.tensors`, in columns; none before the first forward."""
        if self.state is None:
            return {}
        self.leave_slots()
        return self.state.tensors()

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of `tensors`: `exact`, `quantized` (the tier) and `memory`."""
        if self.state is None:
            return {}
        self.leave_slots()
        return self.state.bytes_by_part()

    def load_tensors(self, named: Tensors) -> None:
        """The inverse of `tensors`."""
        self.reset()
        if named:
            self.lazy_initialization(named["keys"], named["values"])
            self.state = LayerState.from_tensors(named)

    def map(self, change: Change) -> None:
        """Each tensor changed in the same way."""
        if self.state is not None:
            self.state = self.state.map(change)

    def get_seq_length(self) -> int:
        return self.progress.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.progress.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None and self.window.in_slots:  # a captured step knows these very tensors
            self.own_memory()
            self.map(lambda x: x.copy_(x.index_select(0, beam_idx.to(x.device))))
        else:
            self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda x: x[indices.to(x.device)])

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        self.map(lambda x: x.to(device))

    def offload(self) -> None:
        self.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.to(self.device)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns (transformers passes a negative number).

        Raises:
            AHNError: it would have to take out of the memory again what is written there.
        """
        self.check_crop(tokens_to_remove)
        if tokens_to_remove and self.state is not None and -tokens_to_remove > self.beside:
            self.leave_slots()
            self.state.window = self.window.map(lambda x: x[:, :, :tokens_to_remove])

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what `crop` would raise, and changes nothing."""
        seen, waiting = self.progress.seen, self.progress.waiting
        if tokens_to_remove > 0:
            raise AHNError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}.")
        gone = seen - waiting - self.config.lossless
        if gone > 0 and -tokens_to_remove > waiting:
            raise AHNError(
                f"Cannot crop {-tokens_to_remove} tokens of a cache that has read {seen}: {gone} of them left the "
                f"window into the memory, which cannot be undone, and only the last {waiting} wait beside it. Keep a "
                "copy (copy.deepcopy(cache)) to go back to, or call cache.activate_past_recording() before what may "
                "have to be taken out is read."
            )


def _padded(x: Tensor, places: int) -> Tensor:
    """x (B, H, n, ...) in memory of its own, with zeros behind it."""
    return torch.cat([x, x.new_zeros(*x.shape[:2], places - x.shape[2], *x.shape[3:])], dim=2)


def _take(x: Tensor, slot: Tensor) -> Tensor:
    """A copy of x (B, H, T, ...) at slot (B or 1, 1) of each row: (B, H, 1, ...)."""
    if slot.shape[0] == 1:
        return x.index_select(2, slot[0])
    return x[torch.arange(x.shape[0], device=x.device), :, slot[:, 0]].unsqueeze(2)


def _put(x: Tensor, slot: Tensor, new: Tensor) -> None:
    """Write new (B, H, 1, ...) into x (B, H, T, ...) at slot (B or 1, 1) of each row."""
    if slot.shape[0] == 1:
        x.index_copy_(2, slot[0], new.to(x.dtype))
    else:
        x[torch.arange(x.shape[0], device=x.device), :, slot[:, 0]] = new[:, :, 0].to(x.dtype)

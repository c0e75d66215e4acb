"""One layer's part of an `AHNCache`: sinks, window, pending write gates and the recurrent state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.layout.copies import join
from ahn.layout.slots import Slots
from ahn.layout.visibility import Visibility

Tensors = dict[str, Tensor]


@dataclasses.dataclass
class SlotRows:
    """What the layers of one cache share while their tokens lie in fixed slots.

    Attributes:
        read: (B or 1,) real tokens of each row so far.
    """

    read: Tensor | None = None


class AHNLayer(CacheLayerMixin):
    """One layer's state: exact keys and values of sinks and window, gates of the tokens in it, and the memory.

    Attributes:
        keys, values: (B, Hkv, T, P) after RoPE, in one of two orders. Columns: T = min(tokens seen, S + W), in index
            order, then as [S sinks | W window]. Slots (`in_slots`): T = S + W, see `ahn.layout.slots.Slots`.
        gates: write gates of the same tokens, each (B, Hq, T, ...), in the keys' precision: their logits have no more.
        state: the memory's state after everything that left the window, or None before the first forward.
        under_way: new tokens were taken, but their forward is not over.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, config: AHNConfig) -> None:
        super().__init__()
        self.keys: Any
        self.values: Any
        self.window, self.sinks = config.window, config.sinks
        self.rows = SlotRows()
        self._empty()

    def _empty(self) -> None:
        self.keys = self.values = None
        self.gates: Tensors = {}
        self.state: Tensors | None = None
        self.seen = 0
        self.in_slots = False
        self.visibility: Visibility | None = None
        self._leaving: tuple[Tensor, Tensor] | None = None
        self.under_way = False
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    # -- one forward: update (called by the base model's attention), then evict, then remember -------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values (B, Hkv, n, P); return all that the queries may see, before anything leaves."""
        view = self.visibility
        if view is None or view.seen != self.seen or view.length != key_states.shape[2]:
            raise AHNError(
                "An AHNCache works only with the model it was made for, with its adapter enabled; "
                "inside ahn.disabled(model) pass another cache or none."
            )
        self.under_way = True
        self.visibility = view = view.on(key_states.device)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._steps_in_slots(view):
            self.enter_slots(view.read_before)
            self.own_memory()
            self._leaving = (_take(self.keys, view.new_slot), _take(self.values, view.new_slot))
            _put(self.keys, view.new_slot, key_states.detach())
            _put(self.values, view.new_slot, value_states.detach())
            return self.keys, self.values
        self.leave_slots()
        keys = view.align(join([self.keys, key_states]))
        values = view.align(join([self.values, value_states]))
        return keys, values

    def attention_mask(self) -> Tensor | None:
        """Mask for the keys that `update` returned: (B or 1, 1, n, keys) bool, None if every key is visible."""
        view = self.visibility
        assert view is not None
        if self._leaving is not None:
            return view.slot_mask
        return view.mask

    def evict(self, keys: Tensor, values: Tensor, gates: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        """Finish the forward: keep sinks and window, return what left.

        Args:
            keys, values: what `update` returned.
            gates: of the new tokens (B, Hq, n, ...).

        Returns:
            keys and values (B, Hkv, m, P) and gates (B, Hq, m, ...) of the evicted tokens.
        """
        view = self.visibility
        assert view is not None
        self.visibility, self.seen = None, view.total
        if self._leaving is not None:
            (key, value), self._leaving = self._leaving, None
            leaving = {name: _take(pending, view.new_slot).float() for name, pending in self.gates.items()}
            for name, pending in self.gates.items():
                _put(pending, view.new_slot, gates[name].detach())
            self.rows.read = view.read_after
            return key, value, leaving
        gates = {name: gate.to(keys.dtype) for name, gate in gates.items()}
        if self.gates:
            gates = {name: view.align(torch.cat([self.gates[name], new], dim=2)) for name, new in gates.items()}
        self.keys, self.values = view.keep(keys).detach(), view.keep(values).detach()
        self.gates = {name: view.keep(gate).detach() for name, gate in gates.items()}
        return (
            view.evicted_slots(keys),
            view.evicted_slots(values),
            {name: view.evicted_slots(gate).float() for name, gate in gates.items()},
        )

    def _steps_in_slots(self, view: Visibility) -> bool:
        """A single token after the window is full replaces the one that leaves instead of copying the window."""
        starts_tier = view.quantized > 0 and view.begins  # the mean of the first window is taken in columns
        return view.length == 1 and view.rolled and view.shift is None and not starts_tier

    def enter_slots(self, read: Tensor) -> None:
        """Lay the tokens out in fixed slots; read (B or 1,) real tokens of each row before now."""
        if not self.in_slots:
            slots = Slots(self.window, self.sinks)
            self._map(lambda x: slots.from_columns(x, self.seen, read), state=False)
            self.in_slots, self.rows.read = True, read

    def leave_slots(self) -> None:
        """Bring the tokens back into columns."""
        if self.in_slots:
            slots, read = Slots(self.window, self.sinks), self.rows.read
            assert read is not None
            self._map(lambda x: slots.to_columns(x, self.seen, read.to(x.device)), state=False)
            self.in_slots = False

    def own_memory(self) -> None:
        """Tensors made under `torch.inference_mode` cannot be written outside of it; copy them once."""
        if not torch.is_inference_mode_enabled():
            self._map(lambda x: x.clone() if x.is_inference() else x)

    # -- the whole layer at once -----------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """All tensors of this layer by name, in columns; empty before the first forward."""
        if not self.is_initialized:
            return {}
        self.leave_slots()
        named = {"keys": self.keys, "values": self.values}
        named |= {f"gates.{name}": gate for name, gate in self.gates.items()}
        return named | {f"state.{name}": part for name, part in (self.state or {}).items()}

    def load_tensors(self, named: Tensors, seen: int) -> None:
        """The inverse of `tensors`."""
        self._empty()
        if not named:
            return
        self.lazy_initialization(named["keys"], named["values"])
        self.keys, self.values, self.seen = named["keys"], named["values"], seen
        self.gates = {name.removeprefix("gates."): x for name, x in named.items() if name.startswith("gates.")}
        state = {name.removeprefix("state."): x for name, x in named.items() if name.startswith("state.")}
        self.state = state or None

    def _map(self, change: Any, state: bool = True) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        self.gates = {name: change(gate) for name, gate in self.gates.items()}
        if state and self.state is not None:
            self.state = {name: change(part) for name, part in self.state.items()}

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self._empty()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.in_slots:  # a captured step knows these very tensors
            self.own_memory()
            self._map(lambda x: x.copy_(x.index_select(0, beam_idx.to(x.device))))
        else:
            self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        self._map(lambda x: x.to(device))

    def offload(self) -> None:
        self.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.to(self.device)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers passes a negative number).

        Raises:
            AHNError: a token has left the window; what was written into the memory cannot be taken out again.
        """
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.leave_slots()
        self._map(lambda x: x[:, :, :tokens_to_remove], state=False)
        self.seen = max(0, self.seen + tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what `crop` would raise, and changes nothing."""
        if tokens_to_remove > 0:
            raise AHNError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}.")
        if tokens_to_remove and self.seen > self.sinks + self.window:
            raise AHNError(
                f"Cannot crop a cache after {self.seen} tokens: {self.seen - self.sinks - self.window} of them left "
                "the window into the memory, which cannot be undone. Keep a copy (copy.deepcopy(cache)) to go back to."
            )


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

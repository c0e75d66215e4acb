"""One layer's part of an `AHNCache`: sinks, window, pending write gates and the recurrent state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.visibility import Visibility

Tensors = dict[str, Tensor]


class AHNLayer(CacheLayerMixin):
    """One layer's state: exact keys and values of sinks and window, gates of the tokens in it, and the memory.

    Attributes:
        keys, values: (B, Hkv, T, P), T = min(tokens seen, S + W), after RoPE. Until S + W tokens were seen they lie in
            index order, then as [S sinks | W window]; in the window, slot `oldest` holds the oldest token.
        gates: write gates of the same slots, each (B, Hq, T, ...) float32.
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
        self._empty()

    def _empty(self) -> None:
        self.keys = self.values = None
        self.gates: Tensors = {}
        self.state: Tensors | None = None
        self.seen = 0
        self.oldest = 0
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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._steps_in_ring(view):
            slot = self.sinks + self.oldest
            self._leaving = (self.keys[:, :, slot : slot + 1].clone(), self.values[:, :, slot : slot + 1].clone())
            self._own_memory()
            self.keys[:, :, slot] = key_states[:, :, 0].detach()
            self.values[:, :, slot] = value_states[:, :, 0].detach()
            return self.keys, self.values
        self._unroll()
        keys = view.align(torch.cat([self.keys, key_states], dim=2))
        values = view.align(torch.cat([self.values, value_states], dim=2))
        return keys, values

    def attention_mask(self) -> Tensor | None:
        """Mask for the keys that `update` returned: (B or 1, 1, n, keys) bool, None if every key is visible."""
        view = self.visibility
        assert view is not None
        if self._leaving is not None:
            return view.ring_mask((self.oldest + 1) % self.window)
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
            slot = self.sinks + self.oldest
            leaving = {name: pending[:, :, slot : slot + 1].clone() for name, pending in self.gates.items()}
            for name, pending in self.gates.items():
                pending[:, :, slot] = gates[name][:, :, 0].detach()
            self.oldest = (self.oldest + 1) % self.window
            return key, value, leaving
        if self.gates:
            gates = {name: view.align(torch.cat([self.gates[name], new], dim=2)) for name, new in gates.items()}
        self.keys, self.values = view.keep(keys).detach(), view.keep(values).detach()
        self.gates = {name: view.keep(gate).detach() for name, gate in gates.items()}
        return (
            view.evicted_slots(keys),
            view.evicted_slots(values),
            {name: view.evicted_slots(gate) for name, gate in gates.items()},
        )

    def _steps_in_ring(self, view: Visibility) -> bool:
        """A single token after the window is full replaces the oldest in place instead of copying the window."""
        return view.length == 1 and view.rolled and view.shift is None and view.sinks_complete

    def _unroll(self) -> None:
        """Bring the window back into index order."""
        if self.oldest:
            at, size = self.sinks + self.oldest, self.sinks + self.window
            order = torch.cat([torch.arange(self.sinks), torch.arange(at, size), torch.arange(self.sinks, at)])
            self._map(lambda x: x[:, :, order.to(x.device)], state=False)
            self.oldest = 0

    def _own_memory(self) -> None:
        """Tensors made under `torch.inference_mode` cannot be written outside of it; copy them once."""
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self._map(torch.clone, state=False)

    # -- the whole layer at once -----------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """All tensors of this layer by name, in index order; empty before the first forward."""
        if not self.is_initialized:
            return {}
        self._unroll()
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

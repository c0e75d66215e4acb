"""`AHNCache`: all state of a conversation. Per layer: sinks, window, pending write gates and the recurrent state."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.shape import ModelShape
from ahn.visibility import Padding, Visibility

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

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


class AHNCache(Cache):
    """Cache of an adapted model; `model(...)` and `model.generate(...)` make one when none is passed.

    Its size does not depend on how much was read. It can be copied (`copy.deepcopy`), moved (`to`), reordered, saved
    and loaded, and many can be used with one model in turn.

    Attributes:
        config: window, sinks and memory it was made with. They stay with the conversation, whatever the model's are.
    """

    def __init__(self, config: AHNConfig, layers: list[Any], offloading: bool = False) -> None:
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self.config = config
        self.padding: Padding | None = None
        self._next_padding: Padding | None = None  # of the forward under way: kept once its last layer is done
        self._batch: int | None = None
        self._model: weakref.ref[PreTrainedModel] | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, batch_size: int | None = None, offloading: bool = False) -> AHNCache:
        """An empty cache for an adapted model.

        Args:
            model: a model that `ahn.attach` was applied to.
            batch_size: rows it will hold; None takes the first forward's.
            offloading: keep the layers on the CPU and bring each to the GPU for its turn (CUDA only).

        Raises:
            AHNError: the model has no adapter.
        """
        config: AHNConfig | None = getattr(model, "ahn_config", None)
        if config is None:
            raise AHNError("This model has no AHN; call ahn.attach(model, ahn.AHNConfig(...)) first.")
        text_config = model.config.get_text_config(decoder=True)
        layers: list[Any] = list(DynamicCache(config=text_config).layers)
        for index in ModelShape.from_config(text_config).memory_layers(config.full_attention_layers):
            layers[index] = AHNLayer(config)
        cache = cls(config, layers, offloading)
        cache._batch = batch_size
        cache._model = weakref.ref(model)  # `save` names the model; a copy of the cache must not copy the model
        return cache

    @property
    def memory_layers(self) -> dict[int, AHNLayer]:
        """The layers with a memory, by index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, AHNLayer)}

    @property
    def seen(self) -> int:
        """Tokens read so far (columns of the batch, padding included)."""
        return next(iter(self.memory_layers.values())).seen

    def begin(self, batch: int, length: int, attention_mask: Tensor | None, device: torch.device) -> Visibility:
        """Prepare one forward over `length` new tokens (called by the adapter's hook on the decoder).

        Args:
            attention_mask: (B, seen + length), zero for padding; None for no new padding.

        Raises:
            AHNError: another batch size, a mask of another shape or with padding between real tokens, or an earlier
                forward stopped halfway.
        """
        self._check_layers_agree()
        if self._batch is not None and batch != self._batch:
            raise AHNError(f"This cache holds {self._batch} sequences, the input has {batch}.")
        before, after = self.padding, self.padding
        new = new_columns(attention_mask, self.seen, length)
        if new is None and before is not None:
            new = torch.ones(batch, length, dtype=torch.bool, device=device)
        if new is not None and (before is not None or not bool(new.all())):
            before = before or Padding.none(batch, device)
            after = before.advance(new.to(device), self.seen)
        view = Visibility(self.config.window, self.config.sinks, self.seen, length, device, before, after)
        self._batch, self._next_padding = batch, after
        for layer in self.memory_layers.values():
            layer.visibility = view
        return view

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[layer_idx]
        if not isinstance(layer, AHNLayer) or not self.offloading:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer.prefetch()  # offloaded again by `finish`, once the forward no longer needs it
        return layer.update(key_states, value_states)

    def finish(self, layer: AHNLayer) -> None:
        """Called when a layer's forward is over."""
        layer.under_way = False
        if layer is self.layers[max(self.memory_layers)]:
            self.padding, self._next_padding = self._next_padding, None
        if self.offloading:
            layer.offload()

    def _check_layers_agree(self) -> None:
        """An interrupt amid a forward (Ctrl-C, out of memory) leaves layers that have read different tokens."""
        read = {layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)}
        if len(read) > 1 or any(layer.under_way for layer in self.memory_layers.values()):
            raise AHNError(
                "A forward with this cache stopped halfway, so its layers have read different tokens. Go on from a "
                "copy made before (copy.deepcopy(cache)), or start again (cache.reset())."
            )

    def _map_padding(self, change: Any) -> None:
        if self.padding is not None:
            self.padding = self.padding.map(change)
            self._batch = len(self.padding.leading)
        else:
            self._batch = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_padding(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_padding(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_padding(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers 5.17 only zeroes these
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.padding = self._batch = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns; see `AHNLayer.crop`."""
        # Layers that may refuse go first: a refusal must not leave the others cropped.
        for layer in self.memory_layers.values():
            layer.check_crop(tokens_to_remove)
        for layer in sorted(self.layers, key=lambda layer: not getattr(layer, "is_sliding", False)):
            layer.crop(tokens_to_remove)
        if self.padding is not None:
            self.padding = dataclasses.replace(self.padding, leading=self.padding.leading.clamp_max(self.seen))

    def to(self, device: torch.device | str) -> AHNCache:
        """Move all tensors to a device, for example to park an idle conversation on the CPU. Returns itself."""
        for layer in self.layers:
            if isinstance(layer, AHNLayer):
                layer.to(device)
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        if self.padding is not None:
            self.padding = self.padding.map(lambda x: x.to(device))
        return self

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, AHNLayer):
                total += sum(x.nbytes for x in layer.tensors().values())
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    def save(self, path: str | Path) -> None:
        """Write the conversation to one safetensors file; see `ahn.cache_file.save`."""
        from ahn import cache_file

        model = None if self._model is None else self._model()
        if model is None:
            raise AHNError("The model of this cache is gone; save a cache while its model is in memory.")
        cache_file.save(self, path, model)

    @staticmethod
    def load(path: str | Path, model: PreTrainedModel) -> AHNCache:
        """Read a conversation that `save` wrote; see `ahn.cache_file.load`."""
        from ahn import cache_file

        return cache_file.load(path, model)


def new_columns(attention_mask: Tensor | None, seen: int, length: int) -> Tensor | None:
    """The part of a 2-D attention mask that speaks of the new tokens, (B, length) bool.

    Raises:
        AHNError: the mask is not 2-D or does not span cached and new tokens.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise AHNError(
            f"An AHN needs a 2-D attention_mask (batch, tokens), got a {type(attention_mask).__name__}. Multimodal "
            "wrappers make their own masks; use the text model inside (for example AutoModelForCausalLM)."
        )
    if attention_mask.dim() != 2:
        raise AHNError(f"An AHN needs a 2-D attention_mask (batch, tokens), got {tuple(attention_mask.shape)}.")
    if attention_mask.shape[1] != seen + length:
        raise AHNError(
            f"attention_mask has {attention_mask.shape[1]} columns; expected {seen + length}: {seen} cached tokens and "
            f"{length} new ones."
        )
    return attention_mask[:, -length:].bool()

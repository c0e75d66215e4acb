"""`AHNCache`: all state of a conversation, one `AHNLayer` for each layer with a memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ahn.cache import file, other, sinks
from ahn.cache.hybrid import with_memory
from ahn.cache.layer import AHNLayer
from ahn.cache.origin import ModelOf, origin
from ahn.cache.progress import Progress, new_columns
from ahn.config import OF_MEMORY, AHNConfig
from ahn.errors import AHNError
from ahn.layout.anchors import anchor_at
from ahn.layout.rotation import Rotation, anchors
from ahn.layout.state import Change, give_scores
from ahn.layout.visibility import Padding, Visibility
from ahn.layout.waiting import ForwardPart, split
from ahn.shape import ModelShape
from ahn.wrappers import attached, attention_of, decoder_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

Message = dict[str, str]
"""What one side said: its `role` and the `content`."""


class AHNCache(Cache):
    """Cache of an adapted model; `model(...)` and `model.generate(...)` make one when none is passed.

    Its size does not depend on how much was read. It can be copied (`copy.deepcopy`), moved (`to`), reordered, saved
    and loaded, and many can be used with one model in turn.

    Attributes:
        config: window, sinks and memory it was made with. They stay with the conversation, whatever the model's are.
        progress: how much was read.
        rows: sequences of the batch; None before the first forward, which decides.
        parts: of the latest forward, where tokens wait beside the window; see `ahn.layout.waiting`.
        captured: the step that `ahn.decode` recorded over this cache's tensors, or None. Copies have none.
        several: likewise, steps of several tokens.
        reading: a forward has begun and is not over, of a model with recurrent layers: those do not say what they read.
        ahead: what knows of a step that may have to be taken back, while `generate` runs, or None. Copies have none.
        messages: what was said, for whoever keeps it here; it goes into the file with the rest and is never read by the
            model.
    """

    def __init__(self, config: AHNConfig, layers: list[Any], offloading: bool = False) -> None:
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self.config = config
        self.progress = Progress()
        self.messages: list[Message] = []
        for layer in self.memory_layers.values():
            layer.progress = self.progress
        self.captured: Any = None
        self.several: Any = None
        self.ahead: Any = None
        self._view: Visibility | None = None  # of the latest forward
        self.parts: list[ForwardPart] = []
        self.rows: int | None = None
        self.reading = False
        self._model: ModelOf | None = None

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
        model = attached(model)
        config: AHNConfig = model.ahn_config
        text_config = model.config.get_text_config(decoder=True)
        layers: list[Any] = list(DynamicCache(config=text_config).layers)
        for index in ModelShape.from_config(text_config).memory_layers(config.full_attention_layers):
            rotates = bool(getattr(attention_of(model, index), "use_rope", True))
            layers[index] = with_memory(layers[index], config, rotates)
        cache = cls(config, layers, offloading)
        cache.rows, cache._model = batch_size, ModelOf(model)  # `save` names it; a copy of the cache must not copy it
        return cache

    @property
    def memory_layers(self) -> dict[int, AHNLayer]:
        """The layers with a memory, by index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, AHNLayer)}

    @property
    def recurrent(self) -> bool:
        """Whether a layer keeps a recurrent state, alone or beside its attention."""
        return any(map(other.recurs, self.layers))

    @property
    def model(self) -> PreTrainedModel | None:
        """The model it was made for, None if that is gone."""
        return None if self._model is None else self._model()

    def belongs_to(self, model: PreTrainedModel) -> bool:
        """Whether its layers and memory are of this model's kind. Which weights wrote them a file knows (`save`)."""
        made, alike = self.model or model, len(self.layers) == len(decoder_of(model).layers)
        alike &= all(getattr(self.config, name) == getattr(model.ahn_config, name) for name in OF_MEMORY)
        return alike and (made is model or ModelShape.from_config(made.config) == ModelShape.from_config(model.config))

    @property
    def seen(self) -> int:
        """Tokens read so far (columns of the batch, padding included)."""
        return self.progress.seen

    def __getstate__(self) -> dict[str, Any]:
        # A graph would go on changing the tensors of the original.
        return vars(self) | {"captured": None, "several": None, "ahead": None}

    def begin(
        self,
        batch: int,
        length: int,
        attention_mask: Tensor | None,
        device: torch.device,
        rotation: Rotation | None = None,
    ) -> Visibility:
        """Prepare one forward over `length` new tokens (called by the adapter's hook on the decoder).

        Args:
            attention_mask: (B, seen + length), zero for padding; None for no new padding.
            rotation: of the base model, where it is known.

        Raises:
            AHNError: another batch size, a mask of another shape or with padding between real tokens, padding where
                tokens are to wait, or an earlier forward stopped halfway.
        """
        self.check_layers_agree()
        self.check_batch(batch)
        # A cache that was moved as a whole comes to where the model is: a layer when its turn comes, see `update`.
        padding = self.progress.padding
        before = after = None if padding is None else padding.to(device)
        new = new_columns(attention_mask, self.seen, length)
        if new is None and before is not None:
            new = torch.ones(batch, length, dtype=torch.bool, device=device)
        if new is not None and (before is not None or not bool(new.all())):
            before = before or Padding.none(batch, device)
            as_base = attention_mask is not None and self.seen + length <= self.config.lossless
            after = before.advance(new.to(device), self.seen, as_base)
        config, waiting = self.config, self.progress.waiting
        later = min(self.progress.to_record(length), max(0, self.seen + length - config.lossless))
        view = Visibility(
            config.window,
            config.sinks,
            self.seen,
            length,
            device,
            before,
            after,
            config.quantized,
            config.reach,
            rotation,
            in_columns=waiting + later > 0,
        )
        if later and view.padded:
            raise AHNError(
                "Tokens that may have to be taken out again wait beside the window only in a batch without padding. "
                "Leave the padding out: a single row needs none."
            )
        self.rows, self._view, self.parts = batch, view, split(view, waiting, later)
        self.reading = self.recurrent
        for layer in self.layers:
            if isinstance(layer, AHNLayer):
                layer.visibility = view
            else:
                other.settle(layer, self.progress.recorded)
        return view

    def check_batch(self, batch: int) -> None:
        """Raises AHNError if this cache holds another number of rows."""
        if self.rows is not None and batch != self.rows:
            raise AHNError(f"This cache holds {self.rows} sequences, the input has {batch}.")

    # -- captured steps (ahn.decode) -------------------------------------------------------------------------------

    def enter_slots(self) -> Tensor:
        """Lay every layer out in fixed slots; returns the real tokens that each row has read, (B or 1,)."""
        self.check_layers_agree()
        lengths = self.progress.row_lengths()
        for layer in self.memory_layers.values():
            layer.enter_slots(lengths)
            layer.own_memory()
        self.progress.lengths = lengths
        return lengths

    def place_sinks(self, rotation: Rotation | None) -> None:
        """Move the sinks along to where the next token's query sees them, if they are not there."""
        reach, progress = self.config.reach, self.progress
        if not reach or rotation is None or progress.seen < reach:
            return
        if len({anchor_at(x, reach) for x in progress.length_bounds() or ()}) == 1 or progress.padding is None:
            anchor: tuple[int, ...] = (anchor_at(progress.seen, reach),)
        else:
            anchor = tuple(anchors(progress.row_lengths(), reach).tolist())
        if anchor != progress.anchor:
            states = [state for layer in self.memory_layers.values() for state in layer.with_moving_sinks()]
            sinks.move(states, progress.anchor, anchor, self.config.sinks, rotation)
            progress.anchor = anchor

    def columns_before(self) -> Tensor:
        """(B or 1,) what to add to a row's position to get its column as rotary embeddings take it by default."""
        padding = self.progress.padding
        return torch.zeros(1, dtype=torch.long) if padding is None else padding.leading - padding.moved

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[layer_idx]
        if not self.offloading and layer.is_initialized and layer.keys.device != key_states.device:
            other.move(layer, key_states.device)
        if not isinstance(layer, AHNLayer):
            other.follow(layer, key_states, value_states)
        if not isinstance(layer, AHNLayer) or not self.offloading:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer.prefetch()  # offloaded again by `finish`, once the forward no longer needs it
        return layer.update(key_states, value_states)

    def finish(self, layer: AHNLayer) -> None:
        """Called when a layer's forward is over."""
        layer.under_way = False
        if layer is self.layers[max(self.memory_layers)]:
            assert self._view is not None
            give_scores({at: x.state for at, x in self.memory_layers.items() if x.state}, self.config.score_layer)
            self.progress.finish(self._view)
        if self.offloading:
            layer.offload()

    def check_layers_agree(self) -> None:
        """Raises AHNError if a forward stopped halfway (Ctrl-C, no memory): layers have read different tokens."""
        seen = {layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)}
        waiting = {layer.visibility is not None for layer in self.memory_layers.values()}
        halfway = self.reading or any(layer.under_way for layer in self.memory_layers.values())
        if len(seen) > 1 or len(waiting) > 1 or halfway:
            raise AHNError(
                "A forward with this cache stopped halfway, so its layers have read different tokens. Go on from a "
                "copy made before (copy.deepcopy(cache)), or start again (cache.reset())."
            )

    def _map_rows(self, change: Change) -> None:
        self.progress.map_rows(change)
        keys = next(iter(self.memory_layers.values())).keys
        self.rows = None if keys is None else len(keys)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            other.repeat_rows(layer, repeats)
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            other.select_rows(layer, indices)
        self._map_rows(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for layer in self.layers:
            other.forget(layer)
        self.progress.clear()
        self.messages, self.rows, self.reading = [], None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns; see `AHNLayer.crop`."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts with tensors
        others = {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, AHNLayer) and self.seen}
        # A refusal must not leave some layers cropped.
        for layer in self.memory_layers.values():
            layer.check_crop(tokens_to_remove)
        for index, layer in others.items():
            other.check_crop(layer, index, -tokens_to_remove)
        for layer in self.memory_layers.values():
            layer.crop(tokens_to_remove)
        for layer in others.values():
            other.crop(layer, -tokens_to_remove)
        self.progress.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """From now on, whatever is read waits beside the window until `crop` is called, and `crop` can take it out.

        What waits is masked out, read and written like what has left the window: the numbers are the same. `crop(0)`
        keeps everything. `generate` switches it on where it guesses tokens ahead (`prompt_lookup_num_tokens`,
        `assistant_model`), and off afterwards.
        """
        super().activate_past_recording()

    @property
    def in_parts(self) -> bool:
        """Tokens wait beside the window, or will."""
        return self.progress.recording or self.progress.waiting > 0

    def to(self, device: torch.device | str) -> AHNCache:
        """Move all tensors to a device, for example to park an idle conversation on the CPU. Returns itself.

        The next forward brings each layer's tensors to where that layer of the model is.
        """
        for layer in self.layers:
            other.move(layer, device)
        self.progress.to(device)
        return self

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(self.bytes_by_part().values())

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of what is kept exactly (with the layers that have no memory), at a few bits (`quantized`), and of the
        `memory`.
        """
        sizes = {"exact": 0, "quantized": 0, "memory": 0}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, AHNLayer):
                for part, size in layer.bytes_by_part().items():
                    sizes[part] += size
            else:
                sizes["exact"] += sum(x.nbytes for x in other.tensors(layer, index).values())
        return sizes

    def save(self, path: str | Path) -> None:
        """Write the conversation to one safetensors file.

        Raises:
            AHNError: the cache is empty, its model is gone, or a layer of it is of a kind that cannot be written.
        """
        model = self.model
        if model is None:
            raise AHNError("The model of this cache is gone; save a cache while its model is in memory.")
        file.write(path, *self.content(), origin(model))

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save` writes of the conversation itself: tensors by name, and a description as JSON types.

        Raises:
            AHNError: the cache is empty, or a layer of it is of a kind that cannot be written.
        """
        if self.seen == 0:
            raise AHNError("This cache has read nothing yet; there is nothing to save.")
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            tensors |= {f"layers.{index}.{name}": x for name, x in other.tensors(layer, index).items()}
        if self.progress.padding is not None:
            tensors |= {f"padding.{name}": x for name, x in vars(self.progress.padding).items()}
        description: dict[str, Any] = {"config": dataclasses.asdict(self.config), "seen": self.seen}
        if self.progress.waiting:
            description["waiting"] = self.progress.waiting
        if self.messages:
            description["messages"] = self.messages
        return tensors, description

    @staticmethod
    def load(path: str | Path, model: PreTrainedModel) -> AHNCache:
        """Read a conversation that `save` wrote, for the same model and adapter, onto the model's device.

        Raises:
            AHNError: the file is missing, damaged or not a cache, or it was made with another base, adapter or memory.
        """
        model = attached(model)
        return load_conversation(path, model, origin(model))


def load_conversation(path: str | Path, model: PreTrainedModel, of: dict[str, Any]) -> AHNCache:
    """`AHNCache.load` where the model's `ahn.cache.origin.origin` is known: it takes a look at every tensor of it."""
    cache = AHNCache.for_model(model)
    tensors, cache.config, seen, cache.messages = file.read(path, model, of)

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    for index, layer in enumerate(cache.layers):
        own = under(f"layers.{index}.")
        if isinstance(layer, AHNLayer):
            layer.config = cache.config
            layer.load_tensors(own)
            cache.rows, columns = len(own["keys"]), own["keys"].shape[2]
            cache.progress.waiting = max(0, columns - cache.config.lossless)
        elif own:
            other.load(layer, own, seen)
    cache.progress.seen = seen
    if padding := under("padding."):
        cache.progress.padding = Padding(**padding)
    return cache

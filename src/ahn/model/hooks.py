"""What is called before an adapted model's parts: on the decoder, which decides what a forward sees; on each attention
module, which hands its input on; and around the decoder, where a model makes its own masks.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ahn import private
from ahn.cache import other
from ahn.cache.conversation import AHNCache
from ahn.cache.layer_context import LayerContext
from ahn.cache.progress import new_columns
from ahn.config import AHNConfig
from ahn.decode.layer import SeveralForward, StepForward
from ahn.errors import AHNError
from ahn.layout.rotation import Rotation
from ahn.layout.visibility import Padding, Visibility
from ahn.memory.layer import AHN, Router
from ahn.model import attention, chunks, masks, packing
from ahn.model.attached import Adapter
from ahn.model.context import BaseForward, ForwardContext
from ahn.model.positions import check_steady, rotates
from ahn.wrappers import attention_of, decoder_of

PEFTS_COPIES = "modules_to_save"
"""What a module has that PEFT put in the place of another one, with copies of it."""


@dataclasses.dataclass
class AttentionHook:
    """Before an attention module's forward: hand its input and memory to the attention function."""

    ahn: AHN
    router: Router | None
    layer_idx: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if "ahn_forward" not in kwargs or isinstance(kwargs["ahn_forward"], BaseForward):
            return None
        step = isinstance(kwargs["ahn_forward"], StepForward | SeveralForward)
        cache = None if step else kwargs.get(private.CACHE)
        rope = kwargs.get("position_embeddings")
        kwargs["ahn_layer"] = LayerContext(
            index=-1 if step else self.layer_idx,
            ahn=self.ahn,
            router=self.router,
            x=kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
            cache=cache,
            cache_layer=None if cache is None else cache.layers[self.layer_idx],
            rope=rope if isinstance(rope, tuple) else None,  # Llama 4 has one tensor, of complex numbers
            rotates=rotates(module),
        )
        return args, kwargs


@dataclasses.dataclass
class KernelHook:
    """Before masks are made around the decoder: they are for our attention, whichever was chosen meanwhile."""

    model: PreTrainedModel

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        take_over_kernel(self.model)


@dataclasses.dataclass
class CacheHook:
    """Before a cache is made around the decoder: it is to be ours; rows of several documents are read without one."""

    model: PreTrainedModel

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs = chunks.by_name(type(module).forward, args, kwargs)
        if self.model._ahn.enabled and kwargs.get(private.CACHE) is None and packing.wants_cache(self.model, kwargs):
            several = bool(packing.documents(self.model, kwargs))
            kwargs |= {"use_cache": False} if several else {private.CACHE: AHNCache.for_model(self.model)}
        return (), kwargs


@dataclasses.dataclass
class DecoderHook:
    """Before the decoder's forward: make the cache if one is wanted, and decide what this forward sees."""

    model: PreTrainedModel

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        take_over_kernel(self.model)
        if "ahn_forward" in kwargs:
            return None  # a captured step: all is decided
        adapter: Adapter = self.model._ahn
        kwargs = chunks.by_name(type(decoder).forward, args, kwargs)
        if not adapter.enabled:
            if isinstance(kwargs.get(private.CACHE), AHNCache):
                raise AHNError("Inside ahn.disabled(model) an AHNCache is of no use; pass another cache, or none.")
            kwargs["ahn_forward"] = BaseForward(adapter.kernel)
            return (), kwargs
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            return None  # the base model says what is wrong
        self._bring_back()
        cache, mask = kwargs.get(private.CACHE), masks.of_tokens(kwargs.get("attention_mask"))
        if adapter.recurrent_base:
            masks.check_gaps(mask, tokens.shape[1])
        if packing.documents(self.model, kwargs | {"attention_mask": mask}):
            if masks.of_images(kwargs.get("attention_mask")):
                raise AHNError(packing.WITH_IMAGES)
            kwargs["attention_mask"] = None  # what was made around the decoder is for the row as a whole
            return (), kwargs  # each comes here again, by `packing.forward`
        if not self.model.ahn_config.max_distance:
            _warn_beyond(adapter, tokens.shape[1] + (cache.seen if isinstance(cache, AHNCache) else 0))
        if isinstance(cache, AHNCache):
            check_steady(adapter.steady, cache.seen, cache.seen + tokens.shape[1])
        if cache is None and packing.wants_cache(self.model, kwargs):
            cache = kwargs[private.CACHE] = AHNCache.for_model(self.model)
        if cache is None and kwargs.get("attention_mask") is not None and self._all_in_sight(tokens.shape[1]):
            kwargs["ahn_forward"] = BaseForward(adapter.kernel)  # whatever the mask is, nothing leaves the window
            return (), kwargs
        view = self._view(cache, tokens, mask, adapter.rotation)
        otherwise = view.moved or (adapter.counts_anew and view.seen > 0)
        if otherwise and _by_columns(kwargs.get("position_ids"), view.seen if adapter.makes_masks else None):
            kwargs["position_ids"] = view.column_positions
        observers, parts = adapter.observers, () if cache is None else cache.parts
        if parts and masks.of_images(kwargs.get("attention_mask")):
            raise AHNError(
                "Images whose parts see each other cannot be read while tokens may be taken out of the conversation "
                "again: generate without guesses (prompt_lookup_num_tokens, assistant_model)."
            )
        if observers and cache is not None and cache.in_parts:
            raise AHNError(
                "ahn.inspect cannot look on while tokens may be taken out of the conversation again: generate without "
                "guesses (prompt_lookup_num_tokens, assistant_model), or read one more token before."
            )
        for observer in observers:
            observer.begin(cache, view)
        config = self.model.ahn_config if cache is None else cache.config
        kwargs["ahn_forward"] = ForwardContext(view, config, adapter.kernel, observers, parts)
        return (), kwargs

    def _bring_back(self) -> None:
        """accelerate has offloaded the memory with the base, with hooks on modules that nobody calls: it is small."""
        layers = [layer for layer in decoder_of(self.model).layers if hasattr(layer, "ahn")]
        first_and_last = layers[:: max(1, len(layers) - 1)]
        if any(hasattr(layer.ahn, PEFTS_COPIES) for layer in first_and_last):
            raise AHNError(
                "PEFT's modules_to_save has copied the memory, and the copy would never be read or trained. Leave the "
                "memory out of it, set requires_grad of ahn.adapter_parameters(model).values() to train it beside "
                "PEFT's part, and save it by ahn.save_adapter."
            )
        if any(callable(getattr(part, "weight", None)) for layer in first_and_last for part in layer.ahn.modules()):
            raise AHNError(
                "torch's quantization has replaced projections of the memory, which is small and needs its own "
                "numbers: quantize the base before ahn.attach or ahn.load_adapter, or name the modules to quantize "
                "without those below `ahn`."
            )
        if not any(x.device.type == "meta" for layer in first_and_last for x in layer.ahn.parameters()):
            return
        for layer in layers:
            device = private.execution_device(attention_of(self.model, layer.ahn.index).o_proj)
            for name in {"ahn", "ahn_router"} & private.children(layer).keys():
                private.bring_back(getattr(layer, name), device)
        if any(x.device.type == "meta" for layer in layers for x in layer.ahn.parameters()):
            raise AHNError("The memory's weights are on the meta device: load them (ahn.load_adapter) before reading.")

    def _all_in_sight(self, length: int) -> bool:
        """Whether a text of this length has nothing but exact attention, with every token in its place."""
        config: AHNConfig = self.model.ahn_config
        reach = config.reach or length
        return length <= min(config.lossless, reach) and not self.model._ahn.observers

    def _view(self, cache: Any, tokens: Tensor, mask: Any, rotation: Rotation | None) -> Visibility:
        batch, length = tokens.shape[:2]
        if cache is not None and not isinstance(cache, AHNCache):
            raise AHNError(
                f"A model with an AHN needs an AHNCache, got {type(cache).__name__}; pass none, or "
                "ahn.AHNCache.for_model(model)."
            )
        if cache is not None and not cache.belongs_to(self.model):
            raise AHNError(
                "This cache was made for another model or memory: read the text with this one, into "
                "ahn.AHNCache.for_model(model)."
            )
        config: AHNConfig = self.model.ahn_config if cache is None else cache.config
        if self.model._ahn.share.parallel and torch.is_grad_enabled():
            raise AHNError(
                "A memory whose heads lie in several processes (tensor parallelism) is for inference: read under "
                "torch.no_grad(), and train with FSDP (--fsdp true)."
            )
        if config.quantized and torch.is_grad_enabled():
            raise AHNError(
                f"quantized = {config.quantized} is for inference: no gradient passes through two-bit codes. Train "
                "with quantized=0 (ahn.set_window(model, window, sinks, quantized=0)), or read under torch.no_grad()."
            )
        seen = 0 if cache is None else cache.seen
        if config.score_layer is not None and length > max(config.lossless - seen, config.window):
            raise AHNError(
                f"These {length} tokens cannot be read at once: layer {config.score_layer} scores tokens for all "
                f"layers, and at most {config.window} new ones (the window) may come together. Pass token ids with a "
                "cache (the default), under torch.no_grad() and without asking for hidden states, and they are read "
                "in parts; or load the adapter with a larger window."
            )
        if cache is not None:
            if cache.recurrent and seen:
                other.bring_states(cache.layers, self.model, next(iter(cache.memory_layers.values())).keys.dtype)
            return cache.begin(batch, length, mask, tokens.device, rotation)
        new = new_columns(mask, 0, length)
        before = after = None
        if new is not None and not bool(new.all()):
            before = Padding.none(batch, tokens.device)
            after = before.advance(new)
        view = Visibility(
            config.window,
            config.sinks,
            0,
            length,
            tokens.device,
            before,
            after,
            config.quantized,
            config.reach,
            rotation,
        )
        if any(view.anchor):
            raise AHNError(
                f"{length} tokens without a cache are more than the {config.reach} positions that the base model can "
                "be trusted with. Read with a cache (the default), cut training samples shorter, or, to place sinks "
                "as published, use max_distance=0."
            )
        return view


@dataclasses.dataclass
class FinishHook:
    """After the decoder's forward: a cache with recurrent layers, which do not say what they read, was read into."""

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get(private.CACHE)
        if isinstance(cache, AHNCache):
            cache.reading = False


def _by_columns(positions: Tensor | None, seen: int | None) -> bool:
    """Whether nobody chose the new tokens' positions: there are none, or (B or 1, n) that count columns from `seen`."""
    if positions is None or seen is None:
        return positions is None
    return positions.dim() == 2 and len(positions) == 1 and int(positions[0, 0]) == seen


def _warn_beyond(adapter: Adapter, length: int) -> None:
    """Say, once, that a text is longer than what the base knows while sinks keep their own positions."""
    if adapter.trained is not None and length > adapter.trained:
        warnings.warn(
            f"This text is longer than the {adapter.trained} positions that the base model was trained on, and its "
            "first tokens are seen from farther than that, as published. Many models break there: load the adapter "
            f"with max_distance={adapter.trained} to keep them in sight.",
            stacklevel=2,
        )
        adapter.trained = None


def take_over_kernel(model: PreTrainedModel) -> None:
    """If somebody chose another attention implementation meanwhile, let it be the base model's; the memory stays."""
    chosen = private.attention_kernel(decoder_of(model).config)
    if chosen != attention.NAME:
        model._ahn.kernel = chosen
        use_kernel(model, attention.NAME)


def use_kernel(model: PreTrainedModel, kernel: str) -> None:
    decoder = decoder_of(model).config
    # What holds several parts would hand it on to all of them: a vision tower has an attention of its own.
    parts = any(part is decoder for part in vars(model.config).values())
    for config in {id(c): c for c in (decoder if parts else model.config, decoder)}.values():
        private.set_attention_kernel(config, kernel)

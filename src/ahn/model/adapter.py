"""Attach an AHN to an unmodified transformers model, take it off again, or switch it off for a while.

Three hooks do it, no modeling code is touched: one on the decoder decides what this forward sees and makes the cache;
one on each attention module hands its input to the attention function; and `forward`/`generate` of the model are
wrapped so that long prompts are read in chunks and generation gets an `AHNCache`.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ahn import memory, private
from ahn.cache.conversation import AHNCache
from ahn.cache.progress import new_columns
from ahn.config import AHNConfig
from ahn.decode.layer import StepForward
from ahn.errors import AHNError
from ahn.layout.rotation import Rotation
from ahn.layout.visibility import Padding, Visibility
from ahn.memory.layer import AHN, Router, added_parameters
from ahn.memory.share import Share
from ahn.model import attention, chunks, packing
from ahn.model.attached import Adapter
from ahn.model.context import BaseForward, ForwardContext, LayerContext
from ahn.model.positions import check_steady, rotates, rotation_of, steady_up_to
from ahn.model.saving import warn_of_peft
from ahn.model.support import attention_module, check_around, check_decoder, decoder_layers
from ahn.ops.quantize import per_group
from ahn.shape import EXACT, ModelShape, trained_length
from ahn.wrappers import attached, unwrapped


def attach(model: PreTrainedModel, config: AHNConfig | None = None) -> PreTrainedModel:
    """Add a new, untrained AHN to a loaded causal language model.

    The base weights are not touched. New parameters are float32 on each layer's device, named
    `….layers.{i}.ahn.fn.*`; their output projection is zero, so the model starts as sinks + window.

    Args:
        model: a decoder with standard attention (Qwen2, Qwen3, Llama, Mistral, Phi-3, OLMo, Gemma 3, …).
        config: window, sinks, memory; None takes `AHNConfig.for_base`, which follows the base. Its `max_distance`
            None becomes the length that the base was trained on, or 0 where its RoPE cannot be turned back.

    Returns:
        The same model object.

    Raises:
        AHNError: the model already has one, or its architecture lacks something an AHN needs (the message says what).
    """
    given, model = model, unwrapped(model)
    config = AHNConfig.for_base(trained_length(model.config)) if config is None else config
    AHNConfig.check(config)
    if getattr(model, "_ahn", None) is not None:
        raise AHNError("This model already has an AHN; call ahn.detach(model) first.")
    shape, modules = ModelShape.from_config(model.config), attachable(model, config)
    first = next(iter(modules.values()))
    share = Share.of(model, first, shape)
    if share.parallel and not memory.get(config.memory).heads_apart:
        raise AHNError(
            f"The memory {config.memory!r} does not say that its heads can be held by several processes "
            "(`heads_apart`): load the model without tensor parallelism, or choose another memory."
        )
    if share.parallel and config.slot_heads is not None:
        raise AHNError(
            "With tensor parallelism all heads keep tokens: load the model on one device, or with slot_heads=None."
        )
    decoder, layers = decoder_layers(model)
    kernel = private.attention_kernel(decoder.config)
    if kernel == attention.NAME:
        raise AHNError("This model's attention is already 'ahn' without an adapter; load the base model afresh.")
    rotation = rotation_of(model, first)
    trained = trained_length(model.config)
    config = _for_rotation(_bounded(config, rotation, trained), rotation)
    adapter = Adapter(
        kernel=kernel, handles=[], rotation=rotation, trained=trained, steady=steady_up_to(model), share=share
    )
    for index, module in modules.items():
        hook = AttentionHook(*_add_memory(layers[index], module, shape, share, config, index), index)
        adapter.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    adapter.handles.append(decoder.register_forward_pre_hook(DecoderHook(model), with_kwargs=True))
    adapter.handles.append(model.register_state_dict_pre_hook(warn_of_peft))
    model._ahn = adapter
    model.ahn_config = config
    chunks.wrap(model)
    _use_kernel(model, attention.NAME)
    return given


def attachable(model: PreTrainedModel, config: AHNConfig) -> dict[int, nn.Module]:
    """The attention modules that get a memory, by their layer's index. The model's weights are not looked at.

    Raises:
        AHNError: the architecture lacks something that an AHN needs.
    """
    shape = ModelShape.from_config(model.config)
    _check_head_dim(shape, config)
    decoder, layers = decoder_layers(model)
    check_decoder(decoder)
    check_around(model, decoder)
    with_memory = shape.memory_layers(config.full_attention_layers)
    for layer, head in config.slot_heads or ():
        if layer not in with_memory or head >= shape.kv_heads:
            raise AHNError(
                f"slot_heads has key head {head} of layer {layer}; this model has {shape.kv_heads} key heads in each "
                f"of the layers {', '.join(map(str, with_memory))}."
            )
    modules = dict[int, nn.Module]()
    for index in with_memory:
        if index >= len(layers):
            raise AHNError(f"The model has {len(layers)} layers, and its configuration says what {shape.layers} are.")
        modules[index] = attention_module(layers[index], shape)
    return modules


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the AHN off: parameters, state dict, configuration and outputs are the base model's again.

    Returns:
        The same object: the model, or what is around it.

    Raises:
        AHNError: the model has no AHN.
    """
    given, model = model, attached(model)
    adapter: Adapter = model._ahn
    _take_over_kernel(model)
    _use_kernel(model, adapter.kernel)
    for handle in adapter.handles:
        handle.remove()
    chunks.unwrap(model)
    _, layers = decoder_layers(model)
    for layer in layers:
        for name in ("ahn", "ahn_router"):
            if hasattr(layer, name):
                delattr(layer, name)
    del model._ahn, model.ahn_config
    return given


def set_window(model: PreTrainedModel, window: int, sinks: int, quantized: int | None = None) -> None:
    """Change window, sinks and (unless None) quantized tokens of an adapted model, for all threads.

    Conversations that have begun keep theirs: caches made before, and what `generate` is writing.
    """
    model = attached(model)
    config: AHNConfig = model.ahn_config
    config = config.replace(window=window, sinks=sinks)
    if quantized is not None:
        config = config.replace(quantized=quantized)
    _check_head_dim(ModelShape.from_config(model.config), config)
    model.ahn_config = config


def adapter_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The AHN's parameters by full name, in the order of `model.named_parameters()`."""
    attached(model)
    return added_parameters(model)


@dataclasses.dataclass
class AttentionHook:
    """Before an attention module's forward: hand its input and memory to the attention function."""

    ahn: AHN
    router: Router | None
    layer_idx: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if "ahn_forward" not in kwargs or isinstance(kwargs["ahn_forward"], BaseForward):
            return None
        step = isinstance(kwargs["ahn_forward"], StepForward)
        cache = None if step else kwargs.get(private.CACHE)
        kwargs["ahn_layer"] = LayerContext(
            index=-1 if step else self.layer_idx,
            ahn=self.ahn,
            router=self.router,
            x=kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
            cache=cache,
            cache_layer=None if cache is None else cache.layers[self.layer_idx],
            rope=kwargs.get("position_embeddings"),
            rotates=rotates(module),
        )
        return args, kwargs


@dataclasses.dataclass
class DecoderHook:
    """Before the decoder's forward: make the cache if one is wanted, and decide what this forward sees."""

    model: PreTrainedModel

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        _take_over_kernel(self.model)
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
        cache = kwargs.get(private.CACHE)
        if packing.documents(self.model, kwargs):
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
        view = self._view(cache, tokens, kwargs.get("attention_mask"), adapter.rotation)
        if view.moved and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = view.column_positions
        observers, parts = adapter.observers, () if cache is None else cache.parts
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
        layers = [layer for layer in self.model.get_decoder().layers if hasattr(layer, "ahn")]
        first_and_last = layers[:: max(1, len(layers) - 1)]
        if not any(x.device.type == "meta" for layer in first_and_last for x in layer.ahn.parameters()):
            return
        for layer in layers:
            for name in {"ahn", "ahn_router"} & private.children(layer).keys():
                private.bring_back(getattr(layer, name), private.execution_device(layer.self_attn.o_proj))
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
        if cache is not None:
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


def _bounded(config: AHNConfig, rotation: Rotation | None, trained: int | None) -> AHNConfig:
    """The configuration with its `max_distance` filled in."""
    if trained is not None and config.lossless > trained:
        warnings.warn(
            f"window + sinks = {config.lossless} tokens are more than the {trained} that the base model was trained "
            "on: it breaks before anything leaves the window. Choose a smaller window.",
            stacklevel=3,
        )
    if config.max_distance is None:
        return config.replace(max_distance=trained or 0 if rotation else 0)
    if config.max_distance and rotation is None:
        raise AHNError(
            "max_distance needs a base model whose rotary embedding can be turned back, which this one's cannot; use "
            "max_distance=0."
        )
    return config


def _for_rotation(config: AHNConfig, rotation: Rotation | None) -> AHNConfig:
    """The configuration with keys of quantized tokens after RoPE where they cannot be turned back."""
    return config if rotation is not None else config.replace(keys_before_rope=False)


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


def _take_over_kernel(model: PreTrainedModel) -> None:
    """If somebody chose another attention implementation meanwhile, let it be the base model's; the memory stays."""
    chosen = private.attention_kernel(model.get_decoder().config)
    if chosen != attention.NAME:
        model._ahn.kernel = chosen
        _use_kernel(model, attention.NAME)


def _use_kernel(model: PreTrainedModel, kernel: str) -> None:
    decoder = model.get_decoder().config
    # What holds several parts would hand it on to all of them: a vision tower has an attention of its own.
    parts = any(part is decoder for part in vars(model.config).values())
    for config in {id(c): c for c in (decoder if parts else model.config, decoder)}.values():
        private.set_attention_kernel(config, kernel)


def _add_memory(
    layer: nn.Module, module: Any, shape: ModelShape, share: Share, config: AHNConfig, index: int
) -> tuple[AHN, Router | None]:
    device = private.execution_device(module.o_proj)
    with torch.device(device):
        whole = memory.make(config, shape, index).float()
        fn = _own_heads(whole, config, shape, share, index) if share.parallel else whole
        layer.ahn = ahn = AHN(fn)
        router = None
        if config.router and isinstance(fn, memory.RecurrentMemory):
            layer.ahn_router = router = Router(fn.heads)
    return ahn, router


def _own_heads(whole: memory.Memory, config: AHNConfig, shape: ModelShape, share: Share, index: int) -> memory.Memory:
    """The memory of this process's heads, as they are in the whole one: so its numbers are drawn alike everywhere."""
    with torch.device("meta"):
        fn = memory.make(config, share.of_shape(shape), index)
    fn.share = share
    sizes = {name: x.shape for name, x in fn.named_parameters()}
    parts = {name: share.of_parameter(x, sizes[name]).clone() for name, x in whole.named_parameters()}
    fn.load_state_dict(parts, assign=True)
    return fn


def _check_head_dim(shape: ModelShape, config: AHNConfig) -> None:
    multiple = max(per_group(bits) if bits != EXACT else 1 for bits in config.tier_bits)
    coded = config.quantized or memory.get(config.memory).moves_keys
    if coded and shape.head_dim % multiple:
        raise AHNError(
            f"A token with {config.key_bits} bits for keys and {config.value_bits} for values needs a head dimension "
            f"that is a multiple of {multiple}, this model's is {shape.head_dim}."
        )

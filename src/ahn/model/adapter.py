"""Attach an AHN to an unmodified transformers model, take it off again, or switch it off for a while.

Three hooks do it, no modeling code is touched: one on the decoder decides what this forward sees and makes the cache;
one on each attention module hands its input to the attention function; and `forward`/`generate` of the model are
wrapped so that long prompts are read in chunks and generation gets an `AHNCache`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ahn import memory, private
from ahn.cache import other
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.layout.rotation import Rotation
from ahn.memory.layer import AHN, Router, added_parameters
from ahn.memory.share import Share
from ahn.model import attention, chunks
from ahn.model.attached import Adapter
from ahn.model.hooks import AttentionHook, CacheHook, DecoderHook, FinishHook, KernelHook, take_over_kernel, use_kernel
from ahn.model.positions import give_own_angles, rotation_of, steady_up_to, take_own_angles
from ahn.model.saving import warn_of_peft
from ahn.model.support import (
    attention_module,
    check_decoder,
    counts_anew,
    decoder_layers,
    makes_caches,
    makes_masks,
)
from ahn.ops.basis import MULTIPLE
from ahn.ops.quantize import per_group
from ahn.shape import EXACT, ModelShape, trained_length
from ahn.wrappers import attached, unwrapped


def attach(model: PreTrainedModel, config: AHNConfig | None = None) -> PreTrainedModel:
    """Add a new, untrained AHN to a loaded causal language model.

    The base weights are not touched. New parameters are float32 on each layer's device, named
    `….layers.{i}.ahn.fn.*`; their output projection is zero, so the model starts as sinks + window.

    Args:
        model: a decoder with standard attention (Qwen2, Qwen3, Llama, Mistral, Phi-3, OLMo, Gemma 3, …).
        config: window, sinks, memory; None takes `AHNConfig.for_base`, which follows the base, with a warning that
            says what it chose. `max_distance` None becomes the length that the base was trained on, or 0 where its
            RoPE cannot be turned back.

    Returns:
        The same model object.

    Raises:
        AHNError: the model already has one, or its architecture lacks something an AHN needs (the message says what).
    """
    given, model = model, unwrapped(model)
    chosen = config is None
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
    if share.parallel and config.passage > 1:
        raise AHNError(
            "With tensor parallelism each key head keeps tokens by itself: load the model on one device, or with "
            "passage=1."
        )
    if share.parallel and config.slot_heads is not None:
        raise AHNError(
            "With tensor parallelism all heads keep tokens: load the model on one device, or with slot_heads=None."
        )
    if share.parallel and config.calibrated_keys:
        raise AHNError(
            "With tensor parallelism keys are not coded in a calibrated basis: load the model on one device, or with "
            "calibrated_keys=False."
        )
    if share.parallel and config.score_layer is not None:
        raise AHNError(
            "With tensor parallelism each layer scores for itself: load the model on one device, or with "
            "score_layer=None."
        )
    decoder, layers = decoder_layers(model)
    kernel = private.attention_kernel(decoder.config)
    if kernel == attention.NAME:
        raise AHNError("This model's attention is already 'ahn' without an adapter; load the base model afresh.")
    rotation = rotation_of(model, first)
    trained = trained_length(model.config)
    config = _for_rotation(_bounded(config, rotation, trained), rotation)
    adapter = Adapter(
        kernel=kernel,
        handles=[],
        rotation=rotation,
        trained=trained,
        steady=steady_up_to(model),
        share=share,
        recurrent_base=any(map(other.recurs, DynamicCache(config=model.config).layers)),
        counts_anew=counts_anew(decoder),
    )
    for index, module in modules.items():
        hook = AttentionHook(*_add_memory(layers[index], module, shape, share, config, index), index)
        adapter.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    adapter.handles.append(decoder.register_forward_pre_hook(DecoderHook(model), with_kwargs=True))
    if adapter.recurrent_base:
        adapter.handles.append(decoder.register_forward_hook(FinishHook(), with_kwargs=True))
    if (around := makes_masks(model, decoder)) is not None:
        adapter.makes_masks = True
        adapter.handles.append(around.register_forward_pre_hook(KernelHook(model)))
    for part in makes_caches(model, decoder):
        adapter.handles.append(part.register_forward_pre_hook(CacheHook(model), with_kwargs=True))
    adapter.handles.append(model.register_state_dict_pre_hook(warn_of_peft))
    model._ahn = adapter
    model.ahn_config = config
    chunks.wrap(model)
    give_own_angles(model)
    use_kernel(model, attention.NAME)
    if chosen:
        warnings.warn(
            f"No configuration was given: window {config.window} and sinks {config.sinks} follow "
            f"{_positions(trained)}. Choose others with ahn.AHNConfig(window=…, sinks=…).",
            stacklevel=2,
        )
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
    makes_masks(model, decoder)
    with_memory = shape.memory_layers(config.full_attention_layers)
    config.check_layers(with_memory)
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
    take_over_kernel(model)
    use_kernel(model, adapter.kernel)
    for handle in adapter.handles:
        handle.remove()
    adapter.handles.clear()
    chunks.unwrap(model)
    take_own_angles(model)
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


def _positions(trained: int | None) -> str:
    """What the base was trained on, in words."""
    return "a base that does not say its length" if trained is None else f"the {trained} positions of the base"


def _for_rotation(config: AHNConfig, rotation: Rotation | None) -> AHNConfig:
    """The configuration with keys of quantized tokens after RoPE where they cannot be turned back."""
    return config if rotation is not None else config.replace(keys_before_rope=False)


def _add_memory(
    layer: nn.Module, module: Any, shape: ModelShape, share: Share, config: AHNConfig, index: int
) -> tuple[AHN, Router | None]:
    device = private.execution_device(module.o_proj)
    with torch.device(device):
        whole = memory.make(config, shape, index).float()
        fn = _own_heads(whole, config, shape, share, index) if share.parallel else whole
        layer.ahn = ahn = AHN(fn, index).train(layer.training)
        router = None
        if config.router and isinstance(fn, memory.RecurrentMemory):
            layer.ahn_router = router = Router(fn.heads).train(layer.training)
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
    multiple = max(multiple, MULTIPLE) if config.calibrated_keys else multiple
    coded = config.quantized or memory.get(config.memory).moves_keys
    if coded and shape.head_dim % multiple:
        raise AHNError(
            f"A token with {config.key_bits} bits for keys and {config.value_bits} for values needs a head dimension "
            f"that is a multiple of {multiple}, this model's is {shape.head_dim}."
        )

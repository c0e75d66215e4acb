"""Caches as they are after a long text, filled with random numbers: how a step runs does not depend on them."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from ahn import private
from ahn.cache import tier
from ahn.cache.conversation import AHNCache
from ahn.cache.layer import AHNLayer
from ahn.config import AHNConfig
from ahn.measure.method import Method
from ahn.memory import Memory
from ahn.wrappers import decoder_of

SAMPLE = 13
"""Tokens of a real forward whose cache shows shapes and plausible gates. No other size in a model is this prime."""
STATE_STD = 0.02


def random_tokens(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids (B, L) on the model's device."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch, length), device=model.device)


def read_cache(method: Method, model: PreTrainedModel, batch: int, context: int, room: int) -> Cache:
    """A cache that has really read `context` random tokens."""
    cache = method.new_cache(model, batch, room)
    model(random_tokens(model, batch, context), logits_to_keep=1, **{private.CACHE: cache})
    return cache


def synthetic_cache(method: Method, model: PreTrainedModel, batch: int, context: int, room: int) -> Cache:
    """A cache of B conversations that looks as if each had read `context` tokens."""
    sample = read_cache(method, model, 1, SAMPLE, SAMPLE)
    cache = method.new_cache(model, batch, room)
    if isinstance(cache, AHNCache):
        cache.rows = batch
    for layer, seen, block in zip(cache.layers, sample.layers, decoder_of(model).layers, strict=True):
        if isinstance(layer, AHNLayer):
            kept = min(context, layer.config.lossless)
            tensors = seen.tensors()
            known = tensors["keys"].shape[2]
            named = {name: _grown(name, x, known, batch, kept) for name, x in tensors.items()}
            layer.load_tensors(named)
            layer.progress.seen = context
            if layer.config.quantized and context > kept:
                _fill_tier(layer, layer.config)
            if context > kept + layer.config.quantized:
                _fill_slots(layer, block.ahn.fn, context)
        elif isinstance(layer, StaticLayer):
            layer.lazy_initialization(_rows(seen.keys, batch), _rows(seen.values, batch))
            layer.keys.normal_()
            layer.values.normal_()
            set_length(layer, context)
        else:
            kept = min(context, layer.sliding_window - 1) if layer.is_sliding else context
            keys, values = (_normal(x, batch, kept) for x in (seen.keys, seen.values))
            layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values = keys, values
            if layer.is_sliding:
                layer.cumulative_length = context
    return cache


def set_length(layer: StaticLayer, context: int) -> None:
    """Make a static layer forget what came after `context` tokens."""
    layer.cumulative_length.fill_(context)
    if isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int = context


def _grown(name: str, x: Tensor, known: int, batch: int, tokens: int) -> Tensor:
    """A layer's tensor of one conversation and `known` tokens, for B conversations and as many tokens as it keeps."""
    if name in ("keys", "values"):
        return _normal(x, batch, tokens)
    if name.startswith("gates."):  # any real gate is a possible one, whatever it stands for
        axis = list(x.shape).index(known, 1)
        chosen = torch.randint(known, (tokens,), device=x.device)
        return _rows(x.index_select(axis, chosen), batch).contiguous()
    return torch.empty(batch, *x.shape[1:], dtype=x.dtype, device=x.device).normal_(std=STATE_STD)


def _fill_tier(layer: AHNLayer, config: AHNConfig) -> None:
    """Give a layer a full tier: any codes are possible ones."""
    assert layer.state is not None
    layer.state.tier = found = tier.empty(config.quantized, layer.window, config.tier_bits)
    for ring in (found.keys, found.values):
        ring.codes.random_(256)
        ring.scales.normal_().abs_()
        ring.offset.normal_().abs_()
    for name, gate in found.gates.items():
        waiting = layer.window.gates[name]
        gate.copy_(waiting[:, :, torch.randint(waiting.shape[2], (config.quantized,), device=waiting.device)])


def _fill_slots(layer: AHNLayer, memory: Memory, context: int) -> None:
    """Give a memory that keeps tokens as many as it can keep, from all over the context."""
    assert layer.state is not None
    slots = memory.empty_slots(layer.window.keys, layer.config.window + layer.config.quantized)
    for name, x in slots.items():
        if name == "positions":
            x.copy_(torch.linspace(layer.config.sinks, context - 1, x.shape[-1]))
        elif x.dtype == torch.uint8:
            x.random_(256)
        elif x.is_floating_point():
            x.normal_(std=STATE_STD)
    layer.state.memory |= slots


def _normal(x: Tensor, batch: int, tokens: int) -> Tensor:
    """Of x (1, Hkv, n, P): (B, Hkv, tokens, P)."""
    return torch.empty(batch, x.shape[1], tokens, x.shape[3], dtype=x.dtype, device=x.device).normal_()


def _rows(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:])

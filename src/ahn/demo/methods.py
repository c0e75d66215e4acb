"""The ways to read that are compared: full attention, sinks + window, and memories, all on one base model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ahn.adapter import adapter_parameters, attach, detach
from ahn.cache import AHNCache
from ahn.checkpoint import load_adapter
from ahn.config import AHNConfig

FULL = "full attention"
WINDOW_ONLY = "sinks + window"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to read.

    Attributes:
        name: what tables call it.
        config: window, sinks and memory; None for full attention.
        weights: the memory's parameters by name.
    """

    name: str
    config: AHNConfig | None = None
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def is_memory(self) -> bool:
        """It remembers what leaves the window."""
        return bool(self.weights) or (self.config is not None and self.config.quantized > 0)

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the block the bare base model `model` reads in this way."""
        if self.config is None:
            yield
            return
        attach(model, self.config)
        try:
            for name, parameter in adapter_parameters(model).items():
                parameter.data = self.weights[name]
            yield
        finally:
            detach(model)

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache, inside the block of `on`."""
        if self.config is None:
            return DynamicCache(config=model.config.get_text_config(decoder=True))
        return AHNCache.for_model(model)


def make_methods(model: PreTrainedModel, adapters: Sequence[str]) -> list[Method]:
    """Full attention, sinks + window, and the memory that is on the model; then one for each of `adapters`.

    If the model has quantized tokens, so have all memories, and a window with nothing but them is one more method.

    The model's memory is taken off: what remains is the bare base model that `Method.on` expects.

    Args:
        model: with a memory attached; its window and sinks hold for all methods.
        adapters: directories or Hub ids of further adapters for the same base.

    Raises:
        AHNError: an adapter cannot be loaded or does not fit.
    """
    config: AHNConfig = model.ahn_config
    memories = [_attached(model)]
    for adapter in adapters:
        load_adapter(model, adapter, window=config.window, sinks=config.sinks, quantized=config.quantized)
        memories.append(_attached(model))
    detach(model)
    window_only = AHNConfig(
        memory="window_only",
        window=config.window,
        sinks=config.sinks,
        full_attention_layers=config.full_attention_layers,
        prefill_chunk_size=config.prefill_chunk_size,
    )
    if config.quantized:
        coarse = window_only.replace(quantized=config.quantized)
        memories.insert(0, Method(f"+ {config.quantized} at two bits", coarse))
    return [Method(FULL), Method(WINDOW_ONLY, window_only), *_with_different_names(memories)]


def _attached(model: PreTrainedModel) -> Method:
    config: AHNConfig = model.ahn_config
    return Method(config.memory, config, {name: p.detach() for name, p in adapter_parameters(model).items()})


def _with_different_names(memories: Sequence[Method]) -> list[Method]:
    """Two adapters of one kind are told apart by a number."""
    names = [method.name for method in memories]
    return [
        dataclasses.replace(m, name=f"{m.name} #{names[: n + 1].count(m.name)}") if names.count(m.name) > 1 else m
        for n, m in enumerate(memories)
    ]


def bytes_of(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds."""
    if isinstance(cache, AHNCache):
        return cache.nbytes()
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def synchronize(model: PreTrainedModel) -> None:
    """Wait until the device has done what it was told, so that a clock can be read."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

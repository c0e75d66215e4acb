"""What is compared: full attention as transformers offers it, sinks + window, and every memory, on one base model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ahn import memory
from ahn.cache.conversation import AHNCache
from ahn.checkpoint import load_adapter
from ahn.checkpoint.directory import Checkpoint
from ahn.checkpoint.format import read_settings
from ahn.checkpoint.hub import local_directory
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.model.adapter import adapter_parameters, attach, detach

DYNAMIC, STATIC, WINDOW = "full-dynamic", "full-static", "window"
READ_STD = 0.02
"""Of a random `o_proj`; a new one is zero, and a read that is zero might be skipped one day."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to read.

    Attributes:
        name: what the command line and tables call it.
        config: window, sinks and memory; None for full attention.
        adapter: where the memory's weights are; None for random ones.
    """

    name: str
    config: AHNConfig | None = None
    adapter: str | None = None

    @property
    def trainable(self) -> bool:
        """It has a memory with parameters."""
        return self.config is not None and self.config.memory in memory.names()

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel, training: bool = False) -> Iterator[None]:
        """Inside the block the bare base model reads in this way; the memory is in float32 for training."""
        if self.config is None:
            yield
            return
        if self.adapter is None:
            attach(model, self.config)
            _randomise(model)
        else:
            load_adapter(model, self.adapter, self.config.window, self.config.sinks, self.config.quantized)
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data.to(torch.float32 if training else model.dtype)
        try:
            yield
        finally:
            detach(model)
            forget_compiled(model)

    def new_cache(self, model: PreTrainedModel, batch: int, room: int) -> Cache:
        """An empty cache, inside the block of `on`; only a static one needs to know for how many tokens."""
        if self.config is not None:
            return AHNCache.for_model(model, batch_size=batch)
        text = model.config.get_text_config(decoder=True)
        return StaticCache(config=text, max_cache_len=room) if self.name == STATIC else DynamicCache(config=text)

    def without_gradients(self) -> contextlib.AbstractContextManager[None]:
        """How to run it. `generate` compiles for `no_grad`; tensors of `inference_mode` cannot be written there."""
        return torch.no_grad() if self.compiled_by_generate else torch.inference_mode()

    @property
    def compiled_by_generate(self) -> bool:
        """transformers' `generate` compiles the step by itself; called directly it would run as it is."""
        return self.name == STATIC


def forget_compiled(model: PreTrainedModel) -> None:
    """Drop what `generate` compiled: for another length of cache or another method it would compile less tightly."""
    kept = model.__dict__
    if any(kept.pop(name, None) is not None for name in ("_compiled_call", "_last_compile_config")):
        torch.compiler.reset()


def make_methods(
    names: Sequence[str] | None,
    window: int | None,
    sinks: int | None,
    adapter: str | None = None,
    quantized: int | None = None,
) -> list[Method]:
    """The methods of these names, all with the same window and sinks.

    Args:
        names: "full-dynamic", "full-static", "window" or the name of a memory; None takes all, or with an adapter the
            three and the adapter's memory.
        window, sinks, quantized: None takes the adapter's, or the defaults.
        adapter: directory or Hub id; gives its weights to the method of its memory.

    Raises:
        AHNError: a name is unknown, or the adapter cannot be read.
    """
    sizes = {"window": window, "sinks": sinks, "quantized": quantized}
    given = {name: value for name, value in sizes.items() if value is not None}
    trained = None
    base = AHNConfig()
    if adapter is not None:
        trained = base = read_settings(Checkpoint.open(local_directory(adapter)).require("adapter"), window, sinks)
    base = base.replace(**given)
    if names is None:
        names = [DYNAMIC, STATIC, WINDOW, *([trained.memory] if trained else memory.names())]
    return [_method(name, base, adapter if trained and name == trained.memory else None) for name in names]


def _method(name: str, base: AHNConfig, adapter: str | None) -> Method:
    if name in (DYNAMIC, STATIC):
        return Method(name)
    if name == WINDOW:
        return Method(name, base.replace(memory="window_only", router=False, q_proj=False))
    if name not in memory.names():
        known = (DYNAMIC, STATIC, WINDOW, *memory.names())
        raise AHNError(f"Unknown method {name!r}; choose from {', '.join(known)}.")
    if adapter is not None:
        return Method(name, base, adapter)
    return Method(name, base.replace(memory=name, router=False, q_proj=False))


def _randomise(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("o_proj.weight"):
                nn.init.normal_(parameter, std=READ_STD)

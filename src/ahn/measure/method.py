"""What is compared: full attention, sinks + window, quantized tokens, memories, all on one base model."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from ahn import memory
from ahn.checkpoint import load_adapter
from ahn.config import AHNConfig
from ahn.measure.reading import new_cache
from ahn.model.adapter import adapter_parameters, attach, detach

READ_STD = 0.02
"""Of an `o_proj` that nobody trained; a new one is zero, and a read that is zero might be skipped one day."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to read.

    Attributes:
        config: window, sinks, quantized tokens and memory; None for full attention.
        weights: the memory's: a directory or Hub id of an adapter, or parameters by name; None for random ones.
        static: full attention with transformers' static cache, for which `generate` compiles the step.
    """

    name: str
    config: AHNConfig | None = None
    weights: str | Mapping[str, Tensor] | None = None
    static: bool = False

    @property
    def trainable(self) -> bool:
        """It has a memory with parameters."""
        return self.config is not None and self.config.memory in memory.names()

    @property
    def adapter(self) -> str | None:
        """Where the weights are, if they are in an adapter."""
        return self.weights if isinstance(self.weights, str) else None

    def attach(self, model: PreTrainedModel, training: bool = False) -> None:
        """Make the bare base model read in this way; the memory is in float32 for training, else as the model is."""
        if self.config is None:
            return
        if isinstance(self.weights, str):
            load_adapter(model, self.weights, self.config.window, self.config.sinks, self.config.quantized)
        else:
            attach(model, self.config)
            self._fill(model)
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data.to(torch.float32 if training else model.dtype)

    def _fill(self, model: PreTrainedModel) -> None:
        for name, parameter in adapter_parameters(model).items():
            if isinstance(self.weights, Mapping):
                parameter.data = self.weights[name]
            elif name.endswith("o_proj.weight"):
                nn.init.normal_(parameter, std=READ_STD)

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel, training: bool = False) -> Iterator[None]:
        """Inside the block the bare base model reads in this way."""
        self.attach(model, training)
        try:
            yield
        finally:
            if self.config is not None:
                detach(model)
                forget_compiled(model)

    def new_cache(self, model: PreTrainedModel, batch: int, room: int) -> Cache:
        """An empty cache, inside the block of `on`; only a static one needs to know for how many tokens."""
        if self.static:
            return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=room)
        return new_cache(model, batch)

    def without_gradients(self) -> contextlib.AbstractContextManager[None]:
        """How to run it. `generate` compiles for `no_grad`; tensors of `inference_mode` cannot be written there."""
        return torch.no_grad() if self.static else torch.inference_mode()


def forget_compiled(model: PreTrainedModel) -> None:
    """Drop what `generate` compiled: for another length of cache or another method it would compile less tightly."""
    kept = model.__dict__
    if any(kept.pop(name, None) is not None for name in ("_compiled_call", "_last_compile_config")):
        torch.compiler.reset()

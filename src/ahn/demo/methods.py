"""What the demonstration compares: full attention, sinks + window, memories, quantized tokens."""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedModel

from ahn.checkpoint import load_adapter
from ahn.config import AHNConfig
from ahn.measure.method import Method
from ahn.model.adapter import adapter_parameters, detach

FULL = "full attention"
WINDOW_ONLY = "sinks + window"


def make_methods(model: PreTrainedModel, adapters: Sequence[str], quantized: int = 0) -> list[Method]:
    """Full attention, sinks + window, and the memory that is on the model; then one for each of `adapters`.

    With quantized tokens two more: sinks + window with these before it and no memory, and with these before it and the
    model's memory behind them.

    The model's memory is taken off: what remains is the bare base model that `Method.on` expects.

    Args:
        model: with a memory attached, without quantized tokens; its window and sinks hold for all methods.
        quantized: tokens before the window that the last two methods see, at the bits that the model's memory has.
    """
    config: AHNConfig = model.ahn_config
    memories = [_attached(model)]
    first = memories[0]
    for adapter in adapters:
        load_adapter(model, adapter, window=config.window, sinks=config.sinks, quantized=0)
        memories.append(_attached(model))
    detach(model)
    window_only = config.replace(memory="window_only", router=False, q_proj=False, calibrated_keys=False)
    coarse = []
    if quantized:
        coarse = [
            Method(window_only.tier_label, window_only.replace(quantized=quantized)),
            Method(f"{config.tier_label} + {first.name}", config.replace(quantized=quantized), first.weights),
        ]
    return [Method(FULL), Method(WINDOW_ONLY, window_only), *_with_different_names(memories), *coarse]


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

"""How each row reads: full attention, a baseline or a trained memory, at an equal budget, chunk by chunk."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import ahn
from ahn import memory
from ahn.checkpoint import load_adapter

from .distill import adapter
from .probes import Hidden
from .recipe import Task, Tier, training

CHUNK = 2048
"""Tokens of a row read at once through the cache, so that no mask has a side as long as the text."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model as a row of the comparison uses it.

    Attributes:
        hidden: reads token ids.
        about: window, sinks, slots, quantized tokens, and what the memory costs at the context's length.
    """

    hidden: Hidden
    about: dict[str, Any]


@contextlib.contextmanager
def method(model: PreTrainedModel, out: Path, task: Task, budget: int, sinks: int, length: int) -> Iterator[Reading]:
    """Inside the block the bare base model reads as the row says.

    Args:
        budget: keys that a layer sees: sinks + window, and a memory's slots; a tier takes the place of some.
        length: of the context, for the costs.
    """
    if task.run.name == "full":
        costs = ahn.cost(model.config, ahn.AHNConfig(memory="window_only"), length, model.dtype).full
        yield Reading(reader(model), _about("full", length, 0, 0, 0, 0, costs))
        return
    trained = training(task)
    if trained is None:
        ahn.attach(model, ahn.AHNConfig(**task.run.settings, window=budget - sinks, sinks=sinks))
    else:
        load_adapter(model, adapter(out, trained), window=budget - sinks, sinks=sinks)
    other = None if trained is None else adapter(out, trained).parent / f"{trained.name}.pt"
    frozen = None
    if other is not None and other.exists():
        frozen = {k: v.clone() for k, v in model.state_dict().items() if ".ahn" not in k}
        model.load_state_dict(torch.load(other), strict=False)
    try:
        slots = fit_window(model, budget)
        if task.run.tier is not None:
            fit_tier(model, task.run.tier, length)
        config: ahn.AHNConfig = model.ahn_config
        cost = ahn.cost(model.config, config, length, model.dtype)
        about = _about(config.memory, config.window, sinks, slots, config.quantized, cost.parameters, cost.ahn)
        yield Reading(reader(model), about)
    finally:
        ahn.detach(model)
        if frozen is not None:
            model.load_state_dict(frozen)


def fit_window(model: PreTrainedModel, budget: int) -> int:
    """Narrow the window of an adapted model until sinks + window + slots is at most the budget; returns the slots."""
    config: ahn.AHNConfig = model.ahn_config
    window = memory.window_within(config.memory, budget - config.sinks)
    ahn.set_window(model, window, config.sinks)
    return memory.slot_count(config.memory, window)


def fit_tier(model: PreTrainedModel, tier: Tier, length: int) -> None:
    """Give an adapted model, whose window is a whole budget's, the window and the quantized tokens of a tier."""
    whole: ahn.AHNConfig = model.ahn_config
    ahn.set_window(model, int(tier.exact * whole.lossless) - whole.sinks, whole.sinks)
    quantized = round(tier.windows * whole.window)
    if tier.bytes_of is not None:
        config: ahn.AHNConfig = model.ahn_config

        def taken(config: ahn.AHNConfig) -> int:
            return ahn.cost(model.config, config, length, model.dtype).ahn.cache_bytes

        most = taken(whole.replace(memory=tier.bytes_of))
        beyond = length - config.lossless  # more would hold nothing
        sizes = range(1, beyond + 1)
        quantized = bisect.bisect_right(sizes, most, key=lambda tokens: taken(config.replace(quantized=tokens)))
    ahn.set_window(model, model.ahn_config.window, whole.sinks, quantized)


def reader(model: PreTrainedModel) -> Hidden:
    """Token ids (B, L) to hidden states (B, L, D), through a cache."""
    decoder = model.get_decoder()

    def hidden(ids: Tensor) -> Tensor:
        adapted = hasattr(model, "ahn_config")
        cache = ahn.AHNCache.for_model(model) if adapted else DynamicCache(config=model.config)
        parts = [
            decoder(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
            for part in ids.to(model.device).split(CHUNK, dim=1)
        ]
        return torch.cat(parts, dim=1)

    return hidden


def _about(
    memory: str, window: int, sinks: int, slots: int, quantized: int, parameters: int, usage: Any
) -> dict[str, Any]:
    exact = {"window": window, "sinks": sinks, "slots": slots, "quantized": quantized}
    names = ("kv_bytes", "quantized_bytes", "state_bytes", "gate_bytes")
    return {"memory": memory, **exact, "parameters": parameters} | {name: getattr(usage, name) for name in names}

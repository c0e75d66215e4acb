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

import ahn
from ahn import memory, private
from ahn.checkpoint.directory import Checkpoint
from ahn.checkpoint.format import read_settings
from ahn.measure.method import Method
from ahn.measure.reading import new_cache

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
    chosen = _method(model, out, task, budget, sinks, length)
    with chosen.on(model):
        yield Reading(reader(model), _about(model, chosen.config, length))


def _method(model: PreTrainedModel, out: Path, task: Task, budget: int, sinks: int, length: int) -> Method:
    if task.run.name == "full":
        return Method("full")
    trained, weights = training(task), None
    if trained is None:
        config = ahn.AHNConfig(**task.run.settings, window=budget - sinks, sinks=sinks)
    else:
        weights = str(adapter(out, trained))
        config = read_settings(Checkpoint.open(Path(weights)), window=budget - sinks, sinks=sinks)
    config = fit_window(config, budget)
    if task.run.tier is not None:
        config = fit_tier(model, config, task.run.tier, length)
    return Method(task.name, config, weights)


TWO_BITS = {"key_bits": 2, "value_bits": 2, "keys_before_rope": False}
"""What these runs are named for, and what their results were measured with."""


def fit_window(config: ahn.AHNConfig, budget: int) -> ahn.AHNConfig:
    """With a window so narrow that sinks + window + slots is at most the budget."""
    return config.replace(window=memory.window_within(config.memory, budget - config.sinks))


def fit_tier(model: PreTrainedModel, whole: ahn.AHNConfig, tier: Tier, length: int) -> ahn.AHNConfig:
    """With the window and the quantized tokens of a tier in place of a whole budget's window."""
    config = whole.replace(window=int(tier.exact * whole.lossless) - whole.sinks, **TWO_BITS)
    quantized = round(tier.windows * whole.window)
    if tier.bytes_of is not None:

        def taken(config: ahn.AHNConfig) -> int:
            return ahn.cost(model.config, config, length, model.dtype).ahn.cache_bytes

        most = taken(whole.replace(memory=tier.bytes_of))
        beyond = length - config.lossless  # more would hold nothing
        sizes = range(1, beyond + 1)
        quantized = bisect.bisect_right(sizes, most, key=lambda tokens: taken(config.replace(quantized=tokens)))
    return config.replace(quantized=quantized)


def reader(model: PreTrainedModel) -> Hidden:
    """Token ids (B, L) to hidden states (B, L, D), through a cache."""
    decoder = model.get_decoder()

    def hidden(ids: Tensor) -> Tensor:
        cache = new_cache(model)
        parts = [
            decoder(input_ids=part, use_cache=True, **{private.CACHE: cache}).last_hidden_state
            for part in ids.to(model.device).split(CHUNK, dim=1)
        ]
        return torch.cat(parts, dim=1)

    return hidden


def _about(model: PreTrainedModel, config: ahn.AHNConfig | None, length: int) -> dict[str, Any]:
    """What a row says of a memory, or of full attention, and its costs after `length` tokens."""
    cost = ahn.cost(model.config, config or ahn.AHNConfig(memory="window_only"), length, model.dtype)
    about: dict[str, Any] = {"memory": "full", "window": length, "sinks": 0, "slots": 0, "quantized": 0}
    if config is not None:
        slots = memory.slot_count(config.memory, config.window + config.quantized, config.slots)
        about = {"memory": config.memory, "window": config.window, "sinks": config.sinks, "slots": slots}
        about["quantized"] = config.quantized
    usage = cost.full if config is None else cost.ahn
    names = ("kv_bytes", "quantized_bytes", "state_bytes", "gate_bytes")
    about["parameters"] = 0 if config is None else cost.parameters
    return about | {name: getattr(usage, name) for name in names}

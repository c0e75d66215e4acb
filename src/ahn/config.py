"""`AHNConfig`: everything that defines an Artificial Hippocampus Network apart from its weights."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable
from typing import Any

from ahn.errors import AHNError
from ahn.layout.anchors import anchor_step
from ahn.shape import DEFAULT_SLOTS

DEFAULT_WINDOW = 32640
DEFAULT_SINKS = 128
MIN_DISTANCE = 16
"""The least `max_distance`, below which nothing could move in steps."""
MODEL_TYPE = "ahn"
"""The model type of a merged checkpoint in its `config.json`, so that nobody loads it without its memory."""
ARCHITECTURE = "AHNForCausalLM"
DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes in which a model can be loaded to be used."""


@dataclasses.dataclass(frozen=True)
class AHNConfig:
    """How a frozen decoder attends and remembers (arXiv 2510.07318, section 3).

    A query at position t attends exactly to the first `sinks` tokens and to the last `window` tokens, itself
    included. Every other token is written into the memory of its layer when it leaves the window, or, with `quantized`,
    that many tokens later: until then queries see what two bits a number keep of it (`ahn.cache.tier`).

    Args:
        memory: one of `ahn.memory.names()`, or of `ahn.memory.baselines()` to compare with.
        window: number of most recent tokens kept exactly (W ≥ 1).
        sinks: number of first tokens kept exactly (S ≥ 0). `window + sinks` is the lossless total.
        full_attention_layers: indices of layers that keep full attention and get no memory.
        router: learn, per head, how much the memory's read counts as more tokens are written.
        q_proj: learn, per head, a projection of the query that reads the memory.
        prefill_chunk_size: tokens processed at once when a prompt is longer than the lossless total. A trade of
            speed against peak memory; the result is the same to float tolerance.
        max_distance: from how far a query may see a sink, in tokens. A base model breaks at distances that it was not
            trained on, so sinks move along behind a text that is longer (`reach`; docs/concepts.md, "Any length").
            None: what the base was trained on, filled in by `attach`. 0: sinks keep their own positions, as published.
        quantized: number of tokens before the window that are still seen, at two bits a number (C ≥ 0). For inference
            with any memory, trained without it; a token takes a seventh or less of its bytes in the window.

        slots: tokens per layer and key head that a memory holds which keeps tokens ("retained"); other memories have no
            use for it. A token takes as many bytes as in the window, and 4 for its position.

    Raises:
        AHNError: a number is out of range, a layer index is negative, or the memory's name is unknown.
    """

    memory: str = "gated_deltanet"
    window: int = DEFAULT_WINDOW
    sinks: int = DEFAULT_SINKS
    full_attention_layers: tuple[int, ...] = ()
    router: bool = False
    q_proj: bool = False
    prefill_chunk_size: int = 8192
    quantized: int = 0
    slots: int = DEFAULT_SLOTS
    max_distance: int | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("window", 1), ("sinks", 0), ("prefill_chunk_size", 1), ("quantized", 0), ("slots", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise AHNError(f"AHNConfig.{name} must be an integer ≥ {minimum}, got {reprlib.repr(value)}.")
        for name in ("router", "q_proj"):
            if not isinstance(getattr(self, name), bool):
                raise AHNError(f"AHNConfig.{name} must be True or False, got {reprlib.repr(getattr(self, name))}.")
        if self.max_distance is not None and (type(self.max_distance) is not int or not self._distance_fits()):
            raise AHNError(
                f"AHNConfig.max_distance must be 0, None or an integer from {MIN_DISTANCE}, "
                f"got {reprlib.repr(self.max_distance)}."
            )
        layers = self.full_attention_layers
        if not isinstance(layers, Iterable) or any(type(i) is not int or i < 0 for i in layers):
            raise AHNError(f"AHNConfig.full_attention_layers must be layer indices ≥ 0, got {reprlib.repr(layers)}.")
        object.__setattr__(self, "full_attention_layers", tuple(sorted(set(layers))))
        from ahn import memory  # the registry imports this module's errors; a top-level import would be circular

        memory.get(self.memory)

    def _distance_fits(self) -> bool:
        return self.max_distance == 0 or (self.max_distance or 0) >= MIN_DISTANCE

    @property
    def reach(self) -> int:
        """Tokens from which on a sink is seen at another position than its own; 0 where it never is.

        It is `max_distance` as long as sinks then have a place before the window; a window that leaves less than a
        quarter of that free pushes them farther.
        """
        if not self.max_distance:
            return 0
        reach = max(self.max_distance, self.lossless)
        while reach - anchor_step(reach) < self.lossless:
            reach = self.lossless + anchor_step(reach)
        return reach

    @property
    def lossless(self) -> int:
        """Number of tokens that are kept exactly: sinks + window."""
        return self.sinks + self.window

    @classmethod
    def for_base(cls, trained: int | None, **fields: Any) -> AHNConfig:
        """The configuration for a base that was trained on so many positions, where window and sinks are not chosen.

        The paper's total of 32 768 tokens if the base was trained on as many, else half of what it was trained on: the
        memory then has something to hold while the base still works.
        """
        if trained is None or trained >= DEFAULT_WINDOW + DEFAULT_SINKS:
            return cls(**fields)
        total = max(trained // 2, 1)
        sinks = min(DEFAULT_SINKS, total // 8)
        return cls(**{"window": total - sinks, "sinks": sinks} | fields)

    def replace(self, **changes: Any) -> AHNConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

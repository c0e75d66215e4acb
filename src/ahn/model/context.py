"""What every layer's attention is given of the whole forward, besides queries, keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ahn.cache.layer_context import LayerContext
from ahn.config import AHNConfig
from ahn.layout.anchored import Anchored
from ahn.layout.tier import TierView
from ahn.layout.visibility import Visibility
from ahn.layout.waiting import ForwardPart
from ahn.model.masks import LazyMask
from ahn.model.observer import Observer
from ahn.model.route import Route, choose, own_scores


@dataclasses.dataclass(frozen=True)
class BaseForward:
    """Stands where a `ForwardContext` does inside `ahn.disabled`: every layer computes what the base model does."""

    kernel: str
    """The base model's own attention implementation."""
    documents: Tensor | None = None
    """(L,) number of the document that each token is of, where a row holds several; none sees another."""


@dataclasses.dataclass
class ForwardContext:
    """What the hook on the decoder tells every layer of one forward."""

    visibility: Visibility
    config: AHNConfig
    """Of the conversation."""
    kernel: str
    """The base model's own attention implementation, for example "sdpa"."""
    observers: tuple[Observer, ...] = ()
    parts: Sequence[ForwardPart] = ()
    """Where tokens wait beside the window; see `ahn.layout.waiting`."""

    def on(self, device: torch.device) -> ForwardContext:
        """The same for layers on another device, made once for all of them."""
        if device == self.visibility.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = dataclasses.replace(self, visibility=self.visibility.on(device))
        return self._elsewhere[device]

    @cached_property
    def in_parts(self) -> list[tuple[ForwardPart, ForwardContext]]:
        """Each part with what its layers are told."""
        device = self.visibility.device
        return [(x, dataclasses.replace(self, visibility=x.view.on(device), parts=())) for x in self.parts]

    def route(self, query: Tensor, base_mask: LazyMask | None, layer: LayerContext, kwargs: dict[str, Any]) -> Route:
        """How layers like this one compute exact attention in this forward; chosen when the first of them asks."""
        cached = layer.cache_layer is not None
        memory_keys = bool(layer.ahn.fn.slot_count(self.visibility.delayed.window))
        of_query = query.device, query.dtype, query.shape[-1], torch.is_grad_enabled()
        of_layer = cached, memory_keys, layer.rotates
        alike = (*of_query, base_mask, *of_layer, own_scores(kwargs), bool(kwargs.get("dropout")))
        if alike not in self._routes:
            tier = self.tier(layer.rotates)
            arguments = self.visibility, tier, self.kernel, base_mask, query, kwargs, cached, memory_keys
            self._routes[alike] = choose(*arguments)
        return self._routes[alike]

    @cached_property
    def _routes(self) -> dict[tuple[Any, ...], Route]:
        return {}

    @cached_property
    def _elsewhere(self) -> dict[torch.device, ForwardContext]:
        return {}

    def tier(self, rotates: bool) -> TierView | None:
        """Who sees which tokens of the tier in layers that turn keys, or do not; None where there is none."""
        if not self.visibility.quantized:
            return None
        if rotates not in self._tiers:
            turned = rotates and self.config.keys_before_rope
            self._tiers[rotates] = TierView(
                self.visibility, self.visibility.rotation if turned else None, self.config.tier_reach if turned else 0
            )
        return self._tiers[rotates]

    @cached_property
    def _tiers(self) -> dict[bool, TierView]:
        return {}

    @cached_property
    def anchored(self) -> Anchored | None:
        """From where queries see keys that a memory moves; None where keys stay as they are."""
        return Anchored.of(self.visibility.delayed)

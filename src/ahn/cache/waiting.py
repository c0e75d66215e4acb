"""Tokens that wait beside the window: in one part of a forward (`ahn.layout.waiting`), and beside fixed slots."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ahn.cache.conversation import AHNCache
from ahn.cache.layer import AHNLayer
from ahn.layout.state import LayerState, Tensors, TierState
from ahn.layout.waiting import ForwardPart


@dataclasses.dataclass
class LayerPart:
    """Stands for an `AHNLayer` whose window holds, for as long as the forward lasts, its new tokens as well."""

    layer: AHNLayer
    part: ForwardPart

    @property
    def state(self) -> LayerState | None:
        """Of the layer."""
        return self.layer.state

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, cached + length, P) of this part."""
        view, window = self.part.view.on(self.layer.window.keys.device), self.layer.window
        last = view.cached + view.length
        return view.align(window.keys[:, :, :last]), view.align(window.values[:, :, :last])

    def evict(self, keys: Tensor, values: Tensor, gates: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        """As `AHNLayer.evict`; the gates of all tokens are there already."""
        view, window = self.part.view.on(keys.device), self.layer.window
        all_gates = {name: view.align(gate) for name, gate in window.gates.items()}
        if self.part.stays:
            assert self.layer.state is not None
            self.layer.state.window = window.map(lambda x: view.keep(view.align(x)).detach())
        left = {name: view.evicted_slots(gate).float() for name, gate in all_gates.items()}
        return view.evicted_slots(keys), view.evicted_slots(values), left

    def keep(self, tier: TierState | None, memory: Tensors) -> None:
        """As `AHNLayer.keep`, where it stays."""
        if self.part.stays:
            self.layer.keep(tier, memory)


def enter_slots(cache: AHNCache, places: int) -> None:
    """Lay a conversation of one row without padding out in slots, with so many places beside them.

    At most so many tokens wait.
    """
    cache.check_layers_agree()
    layers = cache.memory_layers.values()
    if not all(layer.window.in_slots for layer in layers):
        for layer in layers:
            layer.leave_slots()
        cache.progress.beside = cache.progress.waiting
    for layer in layers:
        layer.enter_slots_beside(places)
        layer.own_memory()


def leave_slots(cache: AHNCache) -> None:
    """Bring layers with tokens beside their slots back into columns, for whoever knows slots alone."""
    for layer in cache.memory_layers.values():
        if layer.beside:
            layer.leave_slots()

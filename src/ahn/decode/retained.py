"""Captured steps with a memory that keeps tokens: what happens between two of them.

A step cannot decide which tokens stay: that takes a sort, every G tokens. So before a step that fills a row's block the
memory does it here, as in an ordinary forward. The tokens that stayed then lie decoded where queries see them, until
others stay or the place moves from which far ones are seen.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ahn.cache.conversation import AHNCache
from ahn.layout.anchored import Anchored
from ahn.layout.anchors import anchor_at, anchor_moves, near_reach
from ahn.layout.evicted import Evicted, without_padding
from ahn.layout.rotation import Rotation, anchors
from ahn.layout.slots import Slots, gather
from ahn.layout.state import LayerState, TierState
from ahn.layout.visibility import Padding, Visibility
from ahn.memory.kept import Kept
from ahn.memory.retained_tokens import RetainedTokens
from ahn.ops.quantize import decode, precise
from ahn.ops.step.retained import SeenTokens

NEVER = 1 << 62


def _memory(layer: Any) -> RetainedTokens:
    memory: RetainedTokens = layer.ahn.fn
    return memory


class RetainedSteps:
    """Of one conversation.

    Attributes:
        seen: of each layer, by its index.
        until: so many steps are certain to need nothing of what is done here.
    """

    def __init__(
        self, layers: nn.ModuleList, cache: AHNCache, rotation: Rotation | None, states: Mapping[int, LayerState]
    ) -> None:
        self.config, self.rotation = cache.config, rotation
        self.memories = {index: _memory(layers[index]) for index in states}
        self.rotates = {index: layer.rotates for index, layer in cache.memory_layers.items()}
        memory = next(iter(self.memories.values()))
        self.slots, self.block = memory.slots, memory.block
        self.until, self.anchor = 0, [0]
        self.lossless = self.config.lossless + self.config.quantized
        self.reach = near_reach(self.config.reach, self.lossless) if self.config.reach and rotation is not None else 0
        keys = next(iter(states.values())).window.keys
        self.angles = keys.new_zeros(len(keys), 2, 2, keys.shape[-1], dtype=precise(keys.dtype))
        self.seen: dict[int, SeenTokens] = {}
        weighed = self.config.reach and self.config.passage == 1
        room = max(1, self.config.reach - self.lossless) if weighed else 0
        for index, state in states.items():
            if not self.memories[index].slot_heads:
                continue
            own = state.memory or self.memories[index].empty_slots(state.window.keys, self.lossless)
            state.memory = {name: x.contiguous() for name, x in own.items()}
            turned = rotation is not None and self.rotates[index]
            angles, places = self.angles if turned else None, self.memories[index].places(keys.device)
            self.seen[index] = SeenTokens.of(state.memory, self.slots, angles, room, places)

    def update(self, rotation: Rotation, positions: Tensor) -> None:
        """Angles of the step for the tokens at these positions (B,); a part of the step."""
        leaving = (positions - self.config.window - self.config.quantized).clamp_min(0)
        place = leaving.maximum(anchors(positions, self.reach)) if self.reach else leaving
        cos, sin = rotation.angles(self.angles, torch.stack([leaving, place], dim=1))
        self.angles.copy_(torch.stack([cos, sin], dim=2))
        self.angles[:, 0] /= rotation.scale**2
        self.angles[:, 0, 1].neg_()

    @torch.no_grad()
    def begin(self, cache: AHNCache, states: Mapping[int, LayerState], real: Tensor | None) -> None:
        """Before a step: let memories decide where a block fills, and put what stayed where the queries see it.

        Args:
            real: (B,) rows that have a new token; None for all.
        """
        self.until -= 1
        if self.until >= 0:
            return
        lengths = [int(length) for length in cache.progress.row_lengths().expand(len(self.angles)).tolist()]
        goes_on = [True] * len(lengths) if real is None else real.tolist()
        filling = [row for row, length in enumerate(lengths) if goes_on[row] and self._to_fill(length) == 0]
        if filling:
            self._decide(cache, states, None if all(goes_on) else real, self._rows(filling))
        anchor = [anchor_at(length, self.reach) if self.reach else 0 for length in lengths]
        before: list[int | None] = [*self.anchor] or [None] * len(anchor)
        if changed := [row for row, at in enumerate(anchor) if row in filling or at != before[row]]:
            self._show(states, anchor, self._rows(changed))
        after = [length + on for length, on in zip(lengths, goes_on, strict=True)]
        self.until = min(min(self._to_fill(length), self._to_move(length, self.reach)) for length in after)

    def renew(self) -> None:
        """Others have changed the memories: nothing is where it was."""
        self.until, self.anchor = 0, []

    def _rows(self, some: list[int]) -> Tensor | None:
        """Numbers of rows; None for all of the batch."""
        return None if len(some) == len(self.angles) else torch.tensor(some, device=self.angles.device)

    def _to_fill(self, length: int) -> int:
        """Steps before the one that fills a block of a row of this length."""
        first = self.lossless + self.block - 1
        return first - length if length < first else -(length - first) % self.block

    def _to_move(self, length: int, reach: int) -> int:
        """Steps before the one whose query sees far tokens elsewhere than a query at `length` - 1."""
        if not reach:
            return NEVER
        at, last = max(0, length - 1), length + reach
        return next(iter(anchor_moves(at, last, reach)), last) - length

    def _decide(
        self, cache: AHNCache, states: Mapping[int, LayerState], real: Tensor | None, rows: Tensor | None
    ) -> None:
        """As in an ordinary forward over the new token, in the rows whose block it fills: the others' lies as it is."""
        every = self._view(cache, real)
        view = every if rows is None else self._view(cache, None, rows)
        anchored = Anchored.of(view.delayed)
        for index, state in states.items():
            memory = self.memories[index]
            if not memory.slot_heads:
                continue
            left = _of_rows(self._leaving(state, every, self.rotates[index]), rows)
            left = without_padding(left, memory.closed_gates, view.delayed)
            own = {name: x if rows is None else x[rows] for name, x in state.memory.items()}
            made = memory.extra_keys(left, view.delayed, own, anchored if self.rotates[index] else None)
            assert made is not None
            for name, x in state.memory.items():
                _put(x, rows, made.state[name])

    def _view(self, cache: AHNCache, real: Tensor | None, rows: Tensor | None = None) -> Visibility:
        config, device = self.config, self.angles.device
        before = after = cache.progress.padding
        if real is not None or before is not None:
            before = (before or Padding.none(len(self.angles), device)).to(device)
            before = before if rows is None else before.map(lambda x: x[rows])
            new = torch.ones_like(before.ended) if real is None else real.to(device)
            after = before.advance(new[:, None], cache.seen)
        sizes = config.window, config.sinks, cache.seen, 1, device
        return Visibility(*sizes, before, after, config.quantized, config.reach, self.rotation)

    def _leaving(self, state: LayerState, view: Visibility, rotates: bool) -> Evicted:
        """The token that leaves exact attention, or the tier, in the next step."""
        window, positions = state.window, view.query_positions
        if state.tier is not None:
            return self._from_tier(state.tier, window.keys.dtype, positions, rotates)
        slot = Slots(self.config.window, self.config.sinks).of(positions.clamp_min(0))
        gates = {name: gather(gate, slot).float() for name, gate in window.gates.items()}
        return Evicted(gather(window.keys, slot), gather(window.values, slot), gates)

    def _from_tier(self, tier: TierState, dtype: torch.dtype, positions: Tensor, rotates: bool) -> Evicted:
        slot = (positions - self.config.lossless) % self.config.quantized
        key, value = (
            decode(gather(ring.codes, slot), gather(ring.scales, slot), dtype, ring.bits) + ring.offset.unsqueeze(2)
            for ring in (tier.keys, tier.values)
        )
        if self.rotation is not None and rotates and self.config.keys_before_rope:
            gone = positions - self.config.window - self.config.quantized
            key = self.rotation.turn(key, gone.clamp_min(0))
        gates = {name: gather(gate, slot).float() for name, gate in tier.gates.items()}
        return Evicted(key.to(dtype), value.to(dtype), gates)

    def _show(self, states: Mapping[int, LayerState], anchor: list[int], rows: Tensor | None) -> None:
        """Put all kept tokens of some rows where their queries see them."""
        self.anchor = anchor
        nearest = torch.tensor(anchor, device=self.angles.device)[:, None, None]
        nearest = nearest if rows is None else nearest[rows]
        for index, seen in self.seen.items():
            state = states[index]
            dtype = state.window.keys.dtype
            own = {name: x if rows is None else x[rows] for name, x in state.memory.items()}
            keys, values = (
                torch.cat([Kept.of(own, name).decoded(dtype), own[f"block_{name}s"]], dim=2)
                for name in ("key", "value")
            )
            if self.rotation is not None and self.rotates[index]:
                keys = self.rotation.turn(keys, own["positions"].clamp_min(0).maximum(nearest))
            _put(seen.keys, rows, keys)
            _put(seen.values, rows, values)


def _of_rows(left: Evicted, rows: Tensor | None) -> Evicted:
    """Of some rows; of all for None."""
    if rows is None:
        return left
    return Evicted(left.key[rows], left.value[rows], {name: x[rows] for name, x in left.gates.items()})


def _put(whole: Tensor, rows: Tensor | None, x: Tensor) -> None:
    """Let some rows, or all, be x, in place: a graph reads them."""
    if rows is None:
        whole.copy_(x)
    else:
        whole[rows] = x.to(whole.dtype)

"""Compressive Transformer: evicted keys and values pooled into a bounded queue of slots (arXiv 1911.05507).

Every `RATE` consecutive tokens that leave the window become one slot, which attention sees like any other key. The
queue holds a quarter as many slots as the window, so it reaches as far back again as the window; the oldest is dropped.
At an equal budget of T exact keys, use a window of `T - sinks - slots`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ahn.layout.anchored import Anchored
from ahn.layout.evicted import Evicted
from ahn.layout.visibility import Visibility
from ahn.memory.base import Memory, MemoryKeys, SeenKeys

RATE = 4
SHARE = 4


class PooledMemory(Memory, ABC):
    """Slots of pooled keys and values. Group g of a row pools its positions S + g·RATE to S + (g + 1)·RATE - 1.

    State: `keys`, `values` (B, Hkv, C + 1, P) running pools of the last C + 1 groups, oldest first (the last one may be
    incomplete), and `groups` (B, C + 1) their numbers, -1 for none.
    """

    heads_apart = True
    reduction: ClassVar[str]
    empty: ClassVar[float]

    def slot_count(self, window: int) -> int:
        return max(1, window // SHARE)

    @abstractmethod
    def finish(self, pooled: Tensor) -> Tensor:
        """A group's value from its running pool."""

    def extra_keys(
        self, left: Evicted, view: Visibility, state: dict[str, Tensor], anchored: Anchored | None = None
    ) -> MemoryKeys | None:
        if view.evicted == 0 and not state:
            return None
        capacity = self.slot_count(view.window)
        state = state or self.empty_slots(left.key, view.window)
        if view.evicted:
            keys, values, groups = self._pool(left.key, left.value, view, state)
        else:
            keys, values, groups = state["keys"], state["values"], state["groups"]
        # A group is seen once its last token has left, until C newer ones are complete.
        gone = view.query_positions - view.window - view.sinks + 1
        complete = (gone // RATE)[:, :, None]
        visible = (groups >= 0)[:, None] & (groups[:, None] < complete) & (groups[:, None] >= complete - capacity)
        kept = groups.argsort(dim=1, stable=True)[:, -(capacity + 1) :]  # the newest is always last
        state = {"keys": _take(keys, kept), "values": _take(values, kept), "groups": groups.gather(1, kept)}
        shown = groups[:, None, :, None] >= 0  # pools of no token hold ±inf
        key = self.finish(keys).masked_fill(~shown, 0).to(left.key.dtype)
        value = self.finish(values).masked_fill(~shown, 0).to(left.value.dtype)
        return MemoryKeys([SeenKeys(0, view.length, key, value, visible[:, None])], state)

    def empty_slots(self, key: Tensor, window: int) -> dict[str, Tensor]:
        count = self.slot_count(window) + 1
        pools = torch.full((key.shape[0], key.shape[1], count, key.shape[3]), self.empty, device=key.device)
        groups = torch.full((key.shape[0], count), -1, device=key.device)
        return {"keys": pools, "values": pools.clone(), "groups": groups}

    def _pool(
        self, key: Tensor, value: Tensor, view: Visibility, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Old groups and those that the evicted tokens fill, in order: pools (B, Hkv, C + 1 + G, P), numbers (B, …)."""
        batch, evicted = key.shape[0], key.shape[2]
        positions = (view.query_positions[:, -evicted:] - view.window).expand(batch, -1)
        writable = view.writable if view.writable is not None else torch.ones_like(positions, dtype=torch.bool)
        number = torch.div(positions - view.sinks, RATE, rounding_mode="floor")
        held = state["groups"].shape[1]
        newest = state["groups"].amax(1, keepdim=True)
        # New groups are counted from the newest old one, which may still be filling; -1 + 1 = 0 starts a row.
        first = torch.where(writable, number, number.max() + 1).amin(1, keepdim=True)
        base = torch.where(newest >= 0, newest, first)
        room = int((number - base).clamp_min(0).max()) + 1
        slot = torch.where(writable, held + number - base, held + room)  # padding goes to a slot that is cut off
        merged = torch.where(newest >= 0, held, held + room)  # the filling group moves from its old place to the new
        keys = self._scatter(state["keys"], key, slot, room, merged)
        values = self._scatter(state["values"], value, slot, room, merged)
        numbers = base + torch.arange(room, device=key.device)
        filled = torch.zeros(batch, room + 1, dtype=torch.bool, device=key.device)
        filled = filled.scatter(1, slot - held, True).scatter(1, merged - held, True)[:, :room]
        old = state["groups"].masked_fill(state["groups"] == newest, -1)
        return keys, values, torch.cat([old, numbers.masked_fill(~filled, -1)], dim=1)

    def _scatter(self, old: Tensor, new: Tensor, slot: Tensor, room: int, merged: Tensor) -> Tensor:
        B, H, held, P = old.shape
        grown = torch.full((B, H, held + room + 1, P), self.empty, device=old.device)
        grown[:, :, :held] = old
        grown = grown.scatter_reduce(2, _spread(merged, H, P), old[:, :, -1:], reduce=self.reduction)
        grown = grown.scatter_reduce(2, _spread(slot, H, P), new.float(), reduce=self.reduction)
        return grown[:, :, :-1]


class AveragePooled(PooledMemory):
    """CT-Avg: a slot is the mean of its tokens."""

    name = "ct_avg"
    reduction = "sum"
    empty = 0.0

    def finish(self, pooled: Tensor) -> Tensor:
        return pooled / RATE


class MaxPooled(PooledMemory):
    """CT-Max: a slot is the elementwise maximum of its tokens."""

    name = "ct_max"
    reduction = "amax"
    empty = float("-inf")

    def finish(self, pooled: Tensor) -> Tensor:
        return pooled


def _spread(slots: Tensor, heads: int, head_dim: int) -> Tensor:
    """(B, m) slot numbers for every head and feature: (B, H, m, P)."""
    return slots[:, None, :, None].expand(-1, heads, -1, head_dim)


def _take(x: Tensor, slots: Tensor) -> Tensor:
    return x.gather(2, _spread(slots, x.shape[1], x.shape[3]))

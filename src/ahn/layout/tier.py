"""The low-bit tier's ring: which token of the last C that left the window lies where, and who sees it."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from ahn.layout.visibility import Visibility


@dataclasses.dataclass
class TierView:
    """One forward's view of the tier: which slots hold which positions, and who sees them; the same for all layers.

    Args:
        view: of a forward; in the attributes below tokens leave the window in it.
    """

    view: Visibility

    @property
    def capacity(self) -> int:
        """C, the slots of the ring."""
        return self.view.quantized

    @property
    def held(self) -> bool:
        """Tokens left the window before; else there is no ring yet."""
        return self.view.rolled

    @property
    def steps(self) -> bool:
        """One token at a time: the query sees the ring as it is after the push."""
        return self.held and self.view.length == 1

    @cached_property
    def new(self) -> Tensor:
        """(B or 1, m) positions of the tokens that leave the window, those of padding included."""
        return self.view.query_positions[:, self.view.length - self.view.evicted :] - self.view.window

    def _slots(self, positions: Tensor) -> Tensor:
        return (positions - self.view.sinks) % self.capacity

    def _ring(self, read: Tensor) -> Tensor:
        """(B or 1, C) positions in the ring when each row has read (B or 1,) tokens; -1 for none."""
        slots = torch.arange(self.capacity, device=read.device)
        newest = read[:, None] - self.view.window - 1
        positions = newest - (newest - self.view.sinks - slots) % self.capacity
        return torch.where(positions >= self.view.sinks, positions, -1)

    @cached_property
    def targets(self) -> Tensor:
        """(B or 1, m) the slot that each leaving token takes; C for what takes none: padding, and what soon leaves."""
        kept = self.new >= self.view.lengths_after[:, None] - self.view.window - self.capacity
        if self.view.writable is not None:
            kept = kept & self.view.writable
        return torch.where(kept, self._slots(self.new), self.capacity)

    def put(self, ring: Tensor | None, new: Tensor) -> Tensor:
        """The ring after, of one tensor: new (B, H, m, ...) in a copy of what was before, (B, H, C, ...)."""
        capacity = self.capacity
        if not self.view.padded:  # all but the last C take none
            empty = (*new.shape[:2], capacity, *new.shape[3:])
            copy = new.new_zeros(empty) if ring is None else ring.clone()
            return copy.index_copy_(2, self.targets[0, -capacity:], new[:, :, -capacity:])
        spare = new.new_zeros(*new.shape[:2], capacity + 1 if ring is None else 1, *new.shape[3:])
        grown = spare if ring is None else torch.cat([ring, spare], dim=2)
        index = self.targets[:, None].expand(new.shape[0], new.shape[1], -1)
        index = index.reshape(*index.shape, *[1] * (new.dim() - 3)).expand_as(new)
        return grown.scatter(2, index, new)[:, :, :capacity].contiguous()

    @cached_property
    def visible(self) -> Tensor | None:
        """(B or 1, 1, n, C + m) whether a query sees a token of [ring before | leaving], or (B or 1, 1, 1, C) of the
        ring after a single one; None if all are seen."""
        if self.steps:
            ring = self._ring(self.view.lengths_after)
            full = not self.view.padded and self.view.total >= self.view.delayed.lossless
            return None if full else (ring >= 0)[:, None, None, :]
        new = self.new if self.view.writable is None else self.new.masked_fill(~self.view.writable, -1)
        new = new.masked_fill(new < self.view.sinks, -1)
        keys = torch.cat([self._ring(self.view.lengths_before), new], dim=1) if self.held else new
        newest = self.view.query_positions[:, :, None] - self.view.window
        keys = keys[:, None, :]
        return ((keys >= 0) & (keys <= newest) & (keys > newest - self.capacity))[:, None]

    @cached_property
    def sources(self) -> Tensor:
        """(B or 1, m') where in [ring before | leaving] the tokens are that leave the tier, in order."""
        later = self.view.delayed
        positions = later.query_positions[:, later.length - later.evicted :] - later.window
        first = self.view.lengths_before[:, None] - self.view.window  # of those that leave the window now
        ring = self.capacity if self.held else 0
        new = ring + positions - self.new[:, :1]
        found = torch.where(positions < first, self._slots(positions), new) if self.held else new
        return found.clamp(0, ring + (0 if self.steps else self.view.evicted) - 1)

    def before(self, ring: Tensor, new: Tensor) -> Tensor:
        """[ring before | leaving] of one tensor (B, H, C + m, ...); of a single token the ring says enough."""
        return ring if self.steps else torch.cat([ring, new], dim=2)

    @cached_property
    def in_order(self) -> Tensor:
        """(1, e + m) where in [ring before | leaving] the tokens are, the oldest first; only without padding."""
        view = self.view
        new = torch.arange(view.evicted, device=view.device)
        if not self.held:
            return new[None]
        newest = view.seen - view.window  # the first position that is not in the ring
        ring = torch.arange(max(view.sinks, newest - self.capacity), newest, device=view.device)
        return torch.cat([self._slots(ring), self.capacity + new])[None]

    @cached_property
    def first_window(self) -> tuple[Tensor, Tensor | None] | None:
        """For rows from which the first token leaves: the key slots (B or 1, W) of positions S to S + W, and which rows
        those are, (B, 1, 1) or None for all. None if it is no row's first."""
        view = self.view
        if not view.begins:
            return None
        offset = 0 if not view.rolled else view.sinks + view.window - view.seen
        pads = (view.total - view.lengths_after)[:, None]
        slots = torch.arange(view.sinks, view.sinks + view.window, device=pads.device) + pads + offset
        rows = None if not view.padded else view.beginning[:, None, None]
        return slots.clamp(0, view.cached + view.length - 1), rows

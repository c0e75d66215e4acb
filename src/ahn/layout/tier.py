"""The low-bit tier's ring: which token of the last C that left the window lies where, and who sees it how far away.

With keys before RoPE a query sees a token at its own distance up to `reach`, and all that are farther at that distance:
the first N of the tier are "near" for it, the others "far".
"""

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from ahn.layout.rotation import Known, Rotation
from ahn.layout.visibility import Visibility


@dataclasses.dataclass
class TierView:
    """One forward's view of the tier: which slots hold which positions, and who sees them; the same for all layers.

    Args:
        view: of a forward; in the attributes below tokens leave the window in it.
        rotation: how keys are turned when they are seen; None where they are kept as they were seen, after RoPE.
        reach: the distance at which tokens that are farther are seen, more than the window; 0 for any.
    """

    view: Visibility
    rotation: Rotation | None = None
    reach: int = 0

    @property
    def capacity(self) -> int:
        """C, the slots of the ring."""
        return self.view.quantized

    @property
    def near(self) -> int:
        """N, how many tokens of the tier a query sees at their own distance: those from W to `reach` before it."""
        return near_tokens(self.capacity, self.view.window, 0 if self.rotation is None else self.reach)

    @property
    def any_far(self) -> bool:
        """Whether a query of this forward may see a token from farther than `reach`."""
        return self.near < self.capacity and self.view.total > self.view.lossless + self.near

    @property
    def banded(self) -> bool:
        """`ahn.attend.windowed` can do tokens in their order: none of its bands is too narrow."""
        return self.near > 2 and not (self.any_far and self.capacity - self.near < 3)

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
    def full(self) -> bool:
        """A single query after which each slot of the ring holds a token that it sees."""
        return self.steps and not self.view.padded and self.view.total >= self.view.delayed.lossless

    @cached_property
    def positions(self) -> Tensor:
        """(B or 1, C + m) positions in [ring before | leaving], or (B or 1, C) in the ring after a single token; -1 for
        slots that hold none, padding and sinks."""
        if self.steps:
            return self._ring(self.view.lengths_after)
        new = self.new if self.view.writable is None else self.new.masked_fill(~self.view.writable, -1)
        new = new.masked_fill(new < self.view.sinks, -1)
        return torch.cat([self._ring(self.view.lengths_before), new], dim=1) if self.held else new

    def _visible(self, first: int, last: int) -> Tensor:
        """(B or 1, 1, n, C + m or C) whether a key is one of those that left the window for a query: from the `first`
        of them, 0 for the newest, up to before the `last`."""
        newest = self.view.query_positions[:, :, None] - self.view.window
        keys = self.positions[:, None, :]
        return ((keys >= 0) & (keys <= newest - first) & (keys > newest - last))[:, None]

    @cached_property
    def visible(self) -> Tensor | None:
        """Whether a query sees a token of `positions`, at the token's own distance; None if all are seen so."""
        return None if self.full and not self.any_far else self._visible(0, self.near)

    @cached_property
    def visible_far(self) -> Tensor:
        """The same of the tokens that are seen at the distance `reach`."""
        return self._visible(self.near, self.capacity)

    @cached_property
    def gone(self) -> Tensor:
        """(B or 1, m') positions of the tokens that leave the tier, those of padding included."""
        later = self.view.delayed
        return later.query_positions[:, later.length - later.evicted :] - later.window

    @cached_property
    def sources(self) -> Tensor:
        """(B or 1, m') where in [ring before | leaving] the tokens are that leave the tier, in order."""
        first = self.view.lengths_before[:, None] - self.view.window  # of those that leave the window now
        ring = self.capacity if self.held else 0
        new = ring + self.gone - self.new[:, :1]
        found = torch.where(self.gone < first, self._slots(self.gone), new) if self.held else new
        return found.clamp(0, ring + (0 if self.steps else self.view.evicted) - 1)

    def before(self, ring: Tensor, new: Tensor) -> Tensor:
        """[ring before | leaving] of one tensor (B, H, C + m, ...); of a single token the ring says enough."""
        return ring if self.steps else torch.cat([ring, new], dim=2)

    @cached_property
    def in_order(self) -> Tensor:
        """(1, e + m) where in [ring before | leaving], or in the ring after a single token, the tokens are, the oldest
        first; only without padding."""
        view = self.view
        new = torch.arange(view.evicted, device=view.device)
        if not self.held:
            return new[None]
        newest = view.seen - view.window  # the first position that is not in the ring
        if self.steps:
            newest += 1
        ring = torch.arange(max(view.sinks, newest - self.capacity), newest, device=view.device)
        return torch.cat([self._slots(ring)] if self.steps else [self._slots(ring), self.capacity + new])[None]

    def positions_near(self, in_order: bool, first: int) -> Tensor:
        """(B or 1, ·) of `positions`, in the order of the text if wanted, those from `first` on."""
        if (in_order, first) not in self._near:
            positions = self.positions.index_select(1, self.in_order[0]) if in_order else self.positions
            self._near[in_order, first] = positions[:, first:]
        return self._near[in_order, first]

    @cached_property
    def _near(self) -> dict[tuple[bool, int], Tensor]:
        return {}

    @cached_property
    def far(self) -> Tensor:
        """(1, 1) `reach`."""
        return torch.full((1, 1), self.reach, device=self.view.device)

    @cached_property
    def known(self) -> Known:
        """Angles of positions, for all layers."""
        return {}

    @cached_property
    def first_positions(self) -> Tensor:
        """(1, W) positions of the first window."""
        return torch.arange(self.view.sinks, self.view.sinks + self.view.window, device=self.view.device)[None]

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


def near_tokens(capacity: int, window: int, reach: int) -> int:
    """N, how many of the C tokens of a tier a query sees at their own distance, up to `reach` (0: any)."""
    return min(capacity, reach - window + 1) if reach else capacity

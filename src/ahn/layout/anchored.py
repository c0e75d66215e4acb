"""`Anchored`: where the queries of a forward see keys that a memory moves, which are too far for the base."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from ahn.layout.anchors import anchor_at, anchor_moves, anchor_step, near_reach
from ahn.layout.rotation import Angles, Known, Rotation, anchors
from ahn.layout.visibility import Visibility


@dataclasses.dataclass(frozen=True)
class Anchored:
    """Where the queries of one forward see keys that are farther away than the base should see them.

    Attributes:
        rotation: of the base model.
        anchors: (B or 1, n) of each query: a key before it is seen there.
        spans: the queries, first and beyond the last, of one piece after the other: without padding those between two
            moves of an anchor, with it as many as one step of an anchor, in which that of no row moves twice.
        step: by how far an anchor moves in padded rows, each at a query of its own; 0 without padding.
        places: first and beyond the last of the positions at which keys are seen; None where they may be many, or
            each row has its own.
    """

    rotation: Rotation
    anchors: Tensor
    spans: tuple[tuple[int, int], ...]
    step: int = 0
    places: tuple[int, int] | None = None

    @classmethod
    def of(cls, view: Visibility) -> Anchored | None:
        """For the queries of a forward in which tokens leave the window of `view`; None where keys stay as they are."""
        if view.rotation is None:
            return None
        if not view.reach:
            return cls(
                view.rotation, torch.zeros(1, view.length, dtype=torch.long, device=view.device), ((0, view.length),)
            )
        reach = near_reach(view.reach, view.lossless)
        # Padding has no position: it goes with the first token of its row.
        found = anchors(view.query_positions.maximum(view.lengths_before[:, None]), reach)
        if view.padded:
            step = anchor_step(reach)
            return cls(view.rotation, found, tuple(_pairs(range(0, view.length, step), view.length)), step)
        moves = [position - view.seen for position in anchor_moves(view.seen, view.total - 1, reach)]
        places = anchor_at(view.seen, reach), view.total
        return cls(view.rotation, found, tuple(_pairs([0, *moves], view.length)), places=places)

    def phases(self, first: int, last: int) -> list[AnchorPhase]:
        """The anchors of these queries, one of `spans`. Where rows are padded a GPU is waited for, once."""
        if (first, last) not in self._phases:
            self._phases[first, last] = self._between(first, last)
        return self._phases[first, last]

    def _between(self, first: int, last: int) -> list[AnchorPhase]:
        begun = self.anchors[:, first]
        if not self.step:
            return [AnchorPhase(begun)]
        moved = (self.anchors[:, first:last] - begun[:, None]) // self.step
        if not (most := int(moved.max())):
            return [AnchorPhase(begun)]
        return [AnchorPhase(begun + number * self.step, moved == number) for number in range(most + 1)]

    def turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (B, Hkv, T, P) from before RoPE to positions (B, Hkv, T), or (B, T), in all layers the same tensor."""
        if positions.dim() == 2:
            return self.rotation.turn(keys, positions, self._known)
        return self.rotation.turn(keys, positions, table=self._table(keys))

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (B, Hkv, m, P) at positions (B or 1, m), in all layers the same tensor, to before RoPE."""
        return self.rotation.undo(keys, positions, self._known)

    def _table(self, keys: Tensor) -> Angles | None:
        """For all layers."""
        if self.places is None:
            return None
        precise = torch.promote_types(keys.dtype, torch.float32)
        if precise not in self._tables:
            every = torch.arange(*self.places, device=keys.device)[None]
            cos, sin = self.rotation.angles_at(keys.new_zeros(1, dtype=precise), every)
            self._tables[precise] = Angles(self.places[0], cos[0], sin[0])
        return self._tables[precise]

    @cached_property
    def _phases(self) -> dict[tuple[int, int], list[AnchorPhase]]:
        return {}

    @cached_property
    def _known(self) -> Known:
        return {}

    @cached_property
    def _tables(self) -> dict[torch.dtype, Angles]:
        return {}


@dataclasses.dataclass(frozen=True)
class AnchorPhase:
    """Queries between two moves of their row's anchor.

    Attributes:
        anchor: (B or 1,).
        queries: (B, n) which of a piece's they are; None for all.
    """

    anchor: Tensor
    queries: Tensor | None = None


def _pairs(starts: Iterable[int], stop: int) -> Iterator[tuple[int, int]]:
    """First and beyond the last of what begins at each start and ends where the next begins."""
    return itertools.pairwise([*starts, stop])

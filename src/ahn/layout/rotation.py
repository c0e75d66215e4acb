"""Positions of keys and queries: turned as the base model turns them, and back.

A low-bit token is kept as it was before RoPE, since its numbers then do not depend on where it stood, and is turned to
the place where a query sees it. A base model knows only the distances that it was trained on, so that place is not
always the token's own: see `anchors`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ahn.layout.anchors import anchor_step

Known: TypeAlias = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]]
"""Positions that have been asked for, with their cosines and sines."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """RoPE as one base model does it.

    Attributes:
        angles: cosines and sines (N, T, P') at positions (N, T), in the type and on the device of its first argument:
            the base model's own rotary embedding.
        apply: turns queries and keys (N, H, T, P) by cosines and sines (N, T, P'): the base model's own function.
        scale: what the base model multiplies cosines and sines with, as YaRN does; 1 for most.
    """

    angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    apply: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    scale: float = 1.0

    def turn(self, x: Tensor, positions: Tensor, known: Known | None = None, table: Angles | None = None) -> Tensor:
        """x (B, H, T, P) from before RoPE to these positions, (B or 1, T) or (B or 1, H, T).

        Args:
            known: angles of positions that come again, layer after layer, in the very same tensor.
            table: angles of all these positions.
        """
        return self._turned(x, positions, known, back=False, table=table)

    def undo(self, x: Tensor, positions: Tensor, known: Known | None = None) -> Tensor:
        """x (B, H, T, P) at these positions, (B or 1, T) or (B or 1, H, T), to before RoPE; the inverse of `turn`."""
        return self._turned(x, positions, known, back=True)

    def away(self, query: Tensor, positions: Tensor, distance: Tensor, known: Known | None = None) -> Tensor:
        """Queries (B, H, n, P) at these positions, (B or 1, n), to where they see keys before RoPE at a distance.

        Args:
            distance: (1, 1).
        """
        precise = torch.promote_types(query.dtype, torch.float32)
        turned = self.turn(self.undo(query.to(precise), positions, known), distance, known)
        # Keys have the scale from their turn to position 0.
        return (turned if self.scale == 1 else turned * self.scale).to(query.dtype)

    def _turned(
        self, x: Tensor, positions: Tensor, known: Known | None, back: bool, table: Angles | None = None
    ) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)  # turned more than once, rounded once
        y = x.to(precise)
        if positions.dim() == 3:  # each head has its own
            y = y.flatten(0, 1).unsqueeze(1)
            positions = positions.expand(x.shape[0], x.shape[1], -1).flatten(0, 1)
            known = None
        cos, sin = self._angles(y, positions, known) if table is None else table.at(positions)
        if back:
            cos, sin = (cos, -sin) if self.scale == 1 else (cos / self.scale**2, -sin / self.scale**2)
        turned, _ = self.apply(y, y[:, :0], cos, sin)  # it turns two things; there is no other
        return turned.view(x.shape).to(x.dtype)

    def _angles(self, y: Tensor, positions: Tensor, known: Known | None) -> tuple[Tensor, Tensor]:
        key = id(positions), y.dtype
        if known is None:
            return self.angles_at(y, positions)
        if key not in known:
            known[key] = positions, *self.angles_at(y, positions)  # with the positions, or another might get their id
        return known[key][1:]

    def angles_at(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`angles` on the device of x: a model may lie on several, and its rotary embedding on the first."""
        cos, sin = (part.to(x.device) for part in self.angles(x, positions))
        return cos, sin


@dataclasses.dataclass(frozen=True)
class Angles:
    """Cosines and sines (T, P') of positions from `first` on: of keys with positions per head few are different."""

    first: int
    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, P') each at positions (N, T)."""
        rows = (positions - self.first).flatten()
        cos, sin = (x.index_select(0, rows).unflatten(0, positions.shape) for x in (self.cos, self.sin))
        return cos, sin


def anchors(positions: Tensor, reach: int) -> Tensor:
    """For queries at these positions: where the base sees what is farther back than `reach`, 0 while nothing is.

    Anchors move in steps, so that decoding seldom has to turn anything anew: no query sees its anchor from farther than
    reach - 1, nor, once it has moved, from nearer than reach - `anchor_step(reach)`.

    Args:
        positions: any shape, int64.
        reach: in tokens, at least 4.
    """
    step = anchor_step(reach)
    return torch.where(positions < reach, 0, ((positions - reach).div(step, rounding_mode="floor") + 1) * step)

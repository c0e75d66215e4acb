"""TokenBlocks of the tokens that leave the window: after each the tokens with the highest scores stay.

A row's first G tokens that leave the window are its block 0, the next G its block 1. When a block is full, M of the
tokens kept before and of its own stay, those with the highest scores, per head and of equal scores the older. Until
then its tokens are all there.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ahn.layout.slots import gather
from ahn.layout.visibility import Visibility

NEVER = torch.iinfo(torch.int32).max


class SeenTokens(NamedTuple):
    """Which new query sees which place, each (B, Hkv, n, M + G + m) bool."""

    exactly: Tensor
    """As a token of the block that is filling."""
    kept: Tensor
    """As one that has stayed."""


@dataclasses.dataclass
class TokenBlocks:
    """One forward's way through the blocks, in *places*: M + G slots first, then the m tokens that leave now.

    Args:
        rows: B.
        kept, block: M and G.
    """

    view: Visibility
    rows: int
    kept: int
    block: int

    @property
    def slots(self) -> int:
        return self.kept + self.block

    def _left(self, lengths: Tensor) -> Tensor:
        """(B,) tokens that have left the window of rows of these lengths."""
        return (lengths - self.view.window - self.view.sinks).clamp_min(0).expand(self.rows)

    @cached_property
    def before(self) -> Tensor:
        """(B,) tokens of each row that left in earlier forwards."""
        return self._left(self.view.lengths_before)

    @cached_property
    def later(self) -> Tensor:
        """(B,) tokens of each row that have left after this forward."""
        return self._left(self.view.lengths_after)

    @cached_property
    def numbers(self) -> Tensor:
        """(B, m) how many tokens of its row left before each that leaves now; padding has those of tokens long gone."""
        first = self.view.length - self.view.evicted
        numbers = self.view.query_positions[:, first:] - self.view.window - self.view.sinks
        return numbers.expand(self.rows, -1)

    @cached_property
    def positions(self) -> Tensor:
        """(B, m) positions of the tokens that leave now, -1 for padding."""
        real = self.numbers >= self.before[:, None]
        return torch.where(real, self.numbers + self.view.sinks, -1)

    def _places(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens of each row's block (B,) of that number: their numbers and places, (B, G)."""
        numbers = block[:, None] * self.block + torch.arange(self.block, device=block.device)
        new = self.slots + numbers - self.numbers[:, :1] if self.view.evicted else numbers
        held = numbers < self.before[:, None]
        places = torch.where(held, self.kept + numbers % self.block, new)
        return numbers, places.clamp(self.kept, self.slots + self.view.evicted - 1)

    @cached_property
    def most(self) -> int:
        """At most so many blocks are filled in a row of the batch."""
        view = self.view
        if view.padded:
            return -(-view.evicted // self.block)
        first, last = (max(0, columns - view.lossless) // self.block for columns in (view.seen, view.total))
        return last - first

    def choose(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Who stays.

        Args:
            scores, positions: (B, Hkv, M + G + m) of all places.

        Returns:
            The places of the M tokens that are kept in the end (B, Hkv, M), in the order of the text, and per place
            the number of the block from which on it is forgotten (B, Hkv, M + G + m).
        """
        B, heads, _ = scores.shape
        scores = scores.float().masked_fill(positions < 0, float("-inf"))
        forgotten = torch.full_like(positions, NEVER, dtype=torch.long)
        kept = torch.arange(self.kept, device=scores.device).expand(B, heads, -1)
        for block in range(self.most):
            full = self.before // self.block + block
            _, places = self._places(full)
            both = torch.cat([kept, places[:, None].expand(-1, heads, -1)], dim=2)
            order = scores.gather(2, both).argsort(dim=2, descending=True, stable=True)
            lost = both.gather(2, order[:, :, self.kept :])
            stay = both.gather(2, order[:, :, : self.kept].sort(dim=2).values)
            filled = (full < self.later // self.block)[:, None, None]
            gone = torch.where(filled, full[:, None, None] + 1, NEVER).expand_as(lost)
            forgotten = forgotten.scatter_reduce(2, lost, gone, "amin")
            kept = torch.where(filled, stay, kept)
        return kept, forgotten

    def visible(self, positions: Tensor, forgotten: Tensor) -> SeenTokens:
        """Which query sees which place: what has left by then and is not forgotten."""
        left = (self.view.query_positions - self.view.window - self.view.sinks + 1)[:, None, :, None]
        number = torch.where(positions < 0, NEVER, positions - self.view.sinks)[:, :, None]
        block = torch.div(left, self.block, rounding_mode="floor")
        seen = (number < left) & (block < forgotten[:, :, None])
        filling = torch.div(number, self.block, rounding_mode="floor") == block
        return SeenTokens(seen & filling, seen & ~filling)

    def after(self, x: Tensor, kept: Tensor, empty: int) -> Tensor:
        """What is in the slots after this forward of x (B, Hkv, M + G + m); `empty` where there is no token."""
        return torch.cat([x.gather(2, kept), self.block_after(x[:, :, self.kept :], empty)], dim=2)

    def block_after(self, x: Tensor, empty: int = 0) -> Tensor:
        """What is in the block after this forward of x (B, Hkv, G + m, ...), the block before and what leaves now."""
        numbers, places = self._places(self.later // self.block)
        taken = gather(x, places - self.kept)
        filling = (numbers < self.later[:, None])[:, None]
        return taken.masked_fill(~filling.reshape(*filling.shape, *[1] * (x.dim() - 3)), empty)

    @cached_property
    def beginning(self) -> Tensor:
        """(B,) rows whose first block is filled in this forward."""
        return (self.before < self.block) & (self.later >= self.block)

    def first(self, x: Tensor) -> Tensor:
        """Of x (B, Hkv, G + m, ...) the first block of each row that is `beginning`: (B, Hkv, G, ...)."""
        return gather(x, self._places(torch.zeros_like(self.before))[1] - self.kept)

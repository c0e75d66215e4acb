"""Blocks of the tokens that leave the window: after each the tokens with the highest scores stay.

A row's first G tokens that leave the window are its block 0, the next G its block 1. When a block is full, M of the
tokens kept before and of its own stay, those with the highest scores, per head and of equal scores the older. Until
then its tokens are all there. Where passages stay or go together, each token of a full block has its passage's score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ahn.layout.slots import gather
from ahn.layout.visibility import Visibility

NEVER = torch.iinfo(torch.int32).max
QUERIES = 1024
"""At most so many make a piece, where rows have no padding: what they see besides the M is about as much."""
COUNTED = 64
"""Blocks for which who stays is worked out at once."""


@dataclasses.dataclass(frozen=True)
class Fates:
    """What becomes of the tokens in all places; blocks are counted from the first that is filled in this forward.

    Attributes:
        positions: (B, Hkv, M + G + m), -1 for none.
        forgotten: (B, Hkv, M + G + m) how many blocks are full when a token goes; `NEVER` in this forward.
    """

    positions: Tensor
    forgotten: Tensor


@dataclasses.dataclass
class TokenBlocks:
    """One forward's way through the blocks, in *places*: M + G slots first, then the m tokens that leave now.

    Args:
        rows: B.
        kept, block: M and G.
        passage: how many tokens have one score in a full block; it divides M and G.
    """

    view: Visibility
    rows: int
    kept: int
    block: int
    passage: int = 1

    @classmethod
    def of(cls, view: Visibility, rows: int, kept: int, block: int, passage: int = 1) -> TokenBlocks:
        """The same for all layers of a forward."""
        key = cls, rows, kept, block, passage
        if key not in view.shared:
            view.shared[key] = cls(view, rows, kept, block, passage)
        return view.shared[key]

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

    @cached_property
    def turned(self) -> Tensor:
        """`positions` of which angles are known, padding's too: one tensor for all layers."""
        return self.positions.clamp_min(0)

    def _places(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens of each row's block (B,) of that number: their numbers and places, (B, G)."""
        numbers = block[:, None] * self.block + torch.arange(self.block, device=block.device)
        new = self.slots + numbers - self.numbers[:, :1] if self.view.evicted else numbers
        held = numbers < self.before[:, None]
        places = torch.where(held, self.kept + numbers % self.block, new)
        return numbers, places.clamp(self.kept, self.slots + self.view.evicted - 1)

    def _full(self, columns: int) -> int:
        """Blocks that are full in an unpadded row after so many columns."""
        return max(0, columns - self.view.lossless) // self.block

    @cached_property
    def most(self) -> int:
        """At most so many blocks are filled in a row of the batch."""
        view = self.view
        if view.padded:
            return -(-view.evicted // self.block)
        return self._full(view.total) - self._full(view.seen)

    @cached_property
    def number(self) -> Tensor:
        """(B, 1, G + m) numbers of the tokens in the block and of those that leave now, `NEVER` in empty places."""
        begun = (self.before // self.block * self.block)[:, None]
        own = begun + torch.arange(self.block, device=begun.device)
        own = torch.where(own < self.before[:, None], own, NEVER)
        new = torch.where(self.positions >= 0, self.numbers, NEVER)
        return torch.cat([own, new], dim=1)[:, None]

    @cached_property
    def filled(self) -> Tensor:
        """(B, 1, M + G + m) the block that a token belongs to, counted from the first that is filled in this forward;
        -1 for what is kept, `NEVER` for what belongs to none that is filled."""
        whole = (self.later // self.block * self.block)[:, None, None]
        block = torch.where(self.number < whole, self.own, NEVER)
        return torch.cat([block.new_full((self.rows, 1, self.kept), -1), block], dim=2)

    @cached_property
    def begun(self) -> Tensor:
        """(B,) the first block that is filled in this forward."""
        return self.before // self.block

    @cached_property
    def own(self) -> Tensor:
        """(B, 1, G + m) the block, from `begun` on, of the tokens in the block and of those that leave now."""
        return self.number // self.block - self.begun[:, None, None]

    def by_passage(self, scores: Tensor) -> Tensor:
        """Scores (B, Hkv, M + G + m) with the mean of its passage for each token whose block is filled here."""
        if self.passage == 1 or not self.most:
            return scores
        places, real = self._in_blocks
        own = scores.gather(2, places.expand(-1, scores.shape[1], -1)).unflatten(2, (-1, self.passage))
        mean = own.float().mean(3, keepdim=True).expand_as(own).flatten(2).to(scores.dtype)
        spare = scores.new_zeros(*scores.shape[:2], 1)  # for what is in no full block
        at = torch.where(real, places, scores.shape[2]).expand_as(mean)
        return torch.cat([scores, spare], dim=2).scatter(2, at, mean)[:, :, :-1]

    @cached_property
    def _in_blocks(self) -> tuple[Tensor, Tensor]:
        """The places of all tokens of the blocks that are filled here, (B, 1, most · G), and whether they are any."""
        every = [self._places(self.begun + number) for number in range(self.most)]
        numbers, places = (torch.cat(x, dim=1)[:, None] for x in zip(*every, strict=True))
        return places, numbers < (self.later // self.block * self.block)[:, None, None]

    def fates(self, scores: Tensor, positions: Tensor) -> Fates:
        """Who is forgotten when.

        A token goes when M others of higher scores are there, and those that were there once count as well: each of
        them went for the sake of M that were higher still.

        Args:
            scores, positions: (B, Hkv, M + G + m) of all places.
        """
        if not self.most:
            return Fates(positions, torch.full_like(positions, NEVER))
        scores = scores.float().masked_fill(positions < 0, float("-inf"))
        order = scores.argsort(dim=2, descending=True, stable=True)
        filled = self.filled.expand_as(order).gather(2, order)
        stays = torch.zeros_like(order, dtype=torch.int32)
        for first in range(0, self.most, COUNTED):
            blocks = torch.arange(first, min(first + COUNTED, self.most), device=order.device)
            there = (filled <= blocks[:, None, None, None]).to(torch.int32)
            higher = there.cumsum(-1, dtype=torch.int32) - there
            stays += (higher < self.kept).sum(0, dtype=torch.int32)
        gone = torch.maximum(stays, filled)  # after so many blocks and the next one
        gone = torch.where(gone < self.most, gone + 1, NEVER).to(positions.dtype)
        return Fates(positions, torch.empty_like(gone).scatter(2, order, gone))

    def staying(self, fates: Fates, full: int) -> Tensor:
        """(B, Hkv, M) the places of the M tokens that are kept when so many blocks are full, in the text's order."""
        if not full:
            return torch.arange(self.kept, device=fates.forgotten.device).expand(*fates.forgotten.shape[:2], -1)
        there = (self.filled < full) & (fates.forgotten > full)
        return there.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, : self.kept]

    def lasting(self, fates: Fates, full: int) -> Tensor:
        """`staying`, those that stay longest first."""
        if not self.most:
            return self.staying(fates, full)
        there = (self.filled < full) & (fates.forgotten > full)
        order = fates.forgotten.masked_fill(~there, -1).argsort(dim=2, descending=True, stable=True)
        return order[:, :, : self.kept]

    def pieces(self, spans: Sequence[tuple[int, int]]) -> list[TextPiece]:
        """All queries: those of each span (first, beyond the last) in one or several pieces."""
        key = tuple(spans)
        if key not in self._pieces:
            self._pieces[key] = [piece for span in spans for piece in self._within(*span)]
        return self._pieces[key]

    @cached_property
    def _pieces(self) -> dict[tuple[tuple[int, int], ...], list[TextPiece]]:
        return {}

    def _within(self, first: int, last: int) -> list[TextPiece]:
        view = self.view
        if view.padded:  # every row has numbers of its own: all places
            every = torch.arange(self.kept, self.slots + view.evicted, device=view.device)
            return [TextPiece(self, first, last, 0, every, len(every) if self.most else 0, 0)]
        return [self._piece(at, min(at + QUERIES, last)) for at in range(first, last, QUERIES)]

    def _piece(self, first: int, last: int) -> TextPiece:
        """Without padding: numbers are known here, and no GPU is waited for."""
        view = self.view
        before, begun = max(0, view.seen - view.lossless), self._full(view.seen)
        full = self._full(view.seen + first + 1)
        start, stop = full * self.block, max(0, view.seen + last - view.lossless)
        coded = max(0, self._full(view.seen + last) * self.block - start)
        numbers = torch.arange(start, max(start, stop), device=view.device)
        held, new = self.kept + numbers % self.block, self.slots + numbers - before
        # Every block that is filled takes the place of as many tokens, once there are M.
        certain = max(0, self.kept - coded) if start >= self.kept else 0
        return TextPiece(self, first, last, full - begun, torch.where(numbers < before, held, new), coded, certain)

    def after(self, x: Tensor, kept: Tensor, empty: int) -> Tensor:
        """What is in the slots after this forward of x (B, Hkv, M + G + m); `empty` where there is no token."""
        return torch.cat([x.gather(2, kept), self.block_after(x[:, :, self.kept :], empty)], dim=2)

    def block_after(self, x: Tensor, empty: int = 0) -> Tensor:
        """What is in the block after this forward of x (B, Hkv, G + m, ...), the block before and what leaves now."""
        places, filling = self._last
        return gather(x, places).masked_fill(~filling.reshape(*filling.shape, *[1] * (x.dim() - 3)), empty)

    @cached_property
    def _last(self) -> tuple[Tensor, Tensor]:
        """Where in [block | leaving] the next block is, (B, G), and whether a token is there, (B, 1, G)."""
        numbers, places = self._places(self.later // self.block)
        return places - self.kept, (numbers < self.later[:, None])[:, None]

    @cached_property
    def beginning(self) -> Tensor:
        """(B,) rows whose first block is filled in this forward."""
        return (self.before < self.block) & (self.later >= self.block)

    @cached_property
    def begins(self) -> bool:
        """Whether there is such a row; without padding no GPU is waited for."""
        if self.view.padded:
            return bool(self.beginning.any())
        return self._full(self.view.seen) == 0 < self._full(self.view.total)

    @cached_property
    def _first(self) -> Tensor:
        return self._places(torch.zeros_like(self.before))[1] - self.kept

    def first(self, x: Tensor) -> Tensor:
        """Of x (B, Hkv, G + m, ...) the first block of each row that is `beginning`: (B, Hkv, G, ...)."""
        return gather(x, self._first)


@dataclasses.dataclass
class TextPiece:
    """Some queries of a forward, and what they may see besides the M tokens that stayed before the first.

    Attributes:
        first, last: of the queries, and one beyond.
        full: blocks that are filled before the first query reads.
        places: (T,) of tokens in the text's order, from the block that was filling then on.
        coded: so many of them may be seen after their block is full.
        certain: of the M tokens every query sees at least so many.
    """

    blocks: TokenBlocks
    first: int
    last: int
    full: int
    places: Tensor
    coded: int
    certain: int

    @cached_property
    def bias(self) -> Tensor | None:
        """(B or 1, n) float32 of the scores, by which kept tokens weigh no more than those of a text of trained length.

        The logarithm of how many tokens have left in such a text, over how many have left now; None where it is 0, and
        for passages: they are text, of which the base has seen as much.
        """
        view = self.blocks.view
        if not view.reach or view.total <= view.reach or self.blocks.passage > 1:
            return None
        return (max(1, view.reach - view.lossless) / self._left[:, 0, :, 0].clamp_min(1)).clamp_max(1).log()

    @cached_property
    def _left(self) -> Tensor:
        """(B or 1, 1, n, 1) tokens that have left when each query reads."""
        view = self.blocks.view
        positions = view.query_positions[:, self.first : self.last]
        return (positions - view.window - view.sinks + 1)[:, None, :, None]

    @cached_property
    def _full(self) -> Tensor:
        """(B, 1, n, 1) blocks that are full then, as `Fates` counts them."""
        return self._left.div(self.blocks.block, rounding_mode="floor") - self.blocks.begun[:, None, None, None]

    @cached_property
    def filling(self) -> Tensor:
        """(B, 1, n, T) which query sees which token while the token's block is filling."""
        return (self._number < self._left) & (self._own == self._full)

    @cached_property
    def _filled(self) -> Tensor:
        return (self._own < self._full)[..., : self.coded]

    @cached_property
    def _number(self) -> Tensor:
        return self.blocks.number[:, :, self.places - self.blocks.kept].unsqueeze(2)

    @cached_property
    def _own(self) -> Tensor:
        return self.blocks.own[:, :, self.places - self.blocks.kept].unsqueeze(2)

    def kept(self, positions: Tensor, forgotten: Tensor) -> Tensor:
        """(B, Hkv, n, T) which query sees which token that stayed before, of positions and fates (B, Hkv, T)."""
        return self._full < forgotten.masked_fill(positions < 0, -NEVER).unsqueeze(2)

    def after(self, forgotten: Tensor) -> Tensor:
        """(B, Hkv, n, coded) which query sees which token after its block is full, of (B, Hkv, coded) fates."""
        return self._filled & (self._full < forgotten.unsqueeze(2))

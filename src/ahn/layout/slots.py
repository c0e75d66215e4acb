"""Where a decoding cache keeps its tokens: fixed slots, in which nothing moves."""

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from ahn.layout.copies import take, take_into


def gather(x: Tensor, slots: Tensor) -> Tensor:
    """x (B, H, T, ...) at slots (B or 1, U) of each row: (B, H, U, ...)."""
    if slots.shape[0] == 1:
        return take(x, slots[0])
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[rows, slots].transpose(1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Picked:
    """Tokens that are taken out of several tensors, each with as many tokens.

    Attributes:
        places: (B, H or 1, U) of each head, or of all heads of a row.
    """

    places: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x (B, H, T, ...) at the places: (B, H, U, ...); vectors are copied whole, not number by number."""
        B, H, T = x.shape[:3]
        if x.dim() == 3:
            return x.gather(2, self.places.expand(-1, H, -1))
        return take(x.reshape(1, 1, B * H * T, -1), self._rows(H, T)).view(B, H, -1, x.shape[3])

    def _rows(self, heads: int, tokens: int) -> Tensor:
        """(B · H · U,) the places where heads and rows lie one behind the other."""
        if (heads, tokens) not in self._known:
            first = torch.arange(0, len(self.places) * heads * tokens, tokens, device=self.places.device)
            self._known[heads, tokens] = (self.places + first.view(-1, heads, 1)).flatten()
        return self._known[heads, tokens]

    @cached_property
    def _known(self) -> dict[tuple[int, int], Tensor]:
        return {}


@dataclasses.dataclass(frozen=True)
class Placed:
    """A conversation's way from columns into slots.

    Attributes:
        columns: (B or 1, T) of each slot.
        empty: (B or 1, T) True for slots without a token; None where there are none.
    """

    columns: Tensor
    empty: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """x (B, H, columns, ...) in slots, in memory of its own."""
        return self._emptied(gather(x, self.columns).contiguous())

    def into(self, x: Tensor, target: Tensor) -> None:
        """Write x (1, H, columns, ...) of a single row into a tensor (1, H, T, ...) in slots."""
        take_into(x, self.columns[0], target)
        self._emptied(target)

    def _emptied(self, x: Tensor) -> Tensor:
        if self.empty is None:
            return x
        return x.masked_fill_(self.empty[:, None].reshape(len(self.empty), 1, -1, *[1] * (x.dim() - 3)), 0)


@dataclasses.dataclass(frozen=True)
class Slots:
    """Fixed places for decoding: the token at position p of its row lies in slot p < S, or in S + (p - S) mod W.

    A new token then takes the slot of the one that leaves, nothing moves, and rows with different padding each go
    round at their own pace. "Columns" is the other order, that of `Visibility`.
    """

    window: int
    sinks: int

    def of(self, positions: Tensor) -> Tensor:
        """Slots of tokens at these positions."""
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window)

    def from_columns(self, x: Tensor, seen: int, read: Tensor) -> Tensor:
        """Of x (B, H, min(seen, S + W), ...) in columns: (B, H, S + W, ...) in slots; empty slots are zero.

        Args:
            seen: columns of the batch so far.
            read: (B or 1,) real tokens of each row.
        """
        return self.placed(seen, read, x.device).of(x)

    def placed(self, seen: int, read: Tensor, device: torch.device, full: bool = False) -> Placed:
        """Which columns come into which slots, for all tensors of a conversation.

        Args:
            seen, read: as of `from_columns`.
            full: no slot is empty, as far as the caller knows; a GPU is not asked.
        """
        slots = torch.arange(self.sinks + self.window, device=device)[None]
        read = read.to(device)[:, None]
        latest = read - 1 - (read - 1 - slots) % self.window
        position = torch.where(slots < self.sinks, slots, latest)
        held = (position < read) & (position >= slots)
        column = position + seen - read
        if seen > self.sinks + self.window:
            column = torch.where(slots < self.sinks, slots, column - (seen - self.window) + self.sinks)
        columns = min(seen, self.sinks + self.window)
        return Placed(column.clamp(0, columns - 1), None if full else ~held)

    def to_columns(self, x: Tensor, seen: int, read: Tensor) -> Tensor:
        """The inverse of `from_columns`; columns of padding hold whatever is there."""
        return gather(x, self.of_columns(seen, read))

    def of_columns(self, seen: int, read: Tensor) -> Tensor:
        """(B or 1, columns) in which slot each column's token lies."""
        column = torch.arange(min(seen, self.sinks + self.window), device=read.device)[None]
        index = column
        if seen > self.sinks + self.window:
            index = torch.where(column < self.sinks, column, column - self.sinks + seen - self.window)
        position = (index - (seen - read[:, None])).clamp_min(0)
        slot = self.of(position)
        if seen > self.sinks + self.window:
            slot = torch.where(column < self.sinks, column, slot)
        return slot

"""Who sees what: which keys a query attends to, which tokens leave the window, what they may write.

This is the one place that knows the order of writes, the first eviction and padding (docs/spec.md, section 2).
Everything is stated for one forward over `length` new tokens that follow `seen` earlier ones; all layers of that
forward share it.

Two kinds of number are kept apart. The *index* of a token counts every column of the batch, padding included, and is
the same for all rows. Its *position* counts the row's real tokens: position = index - pads of the row. Windows slide by
index, so every row evicts at the same moment; positions decide whether what is evicted was a real token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ahn.errors import AHNError
from ahn.layout.anchors import anchor_at
from ahn.layout.copies import join
from ahn.layout.rotation import Rotation, anchors
from ahn.layout.slots import Slots, gather

FOR_EVER = torch.iinfo(torch.int32).max
"""In `Visibility.until`: every later query sees the key."""


@dataclasses.dataclass
class Padding:
    """Padding of each row of a batch up to now.

    Attributes:
        leading: (B,) columns of the row that are padding and come before, or were moved before, its real tokens.
        ended: (B,) rows that were padded on the right: a real token may follow only while nothing leaves the window.
        moved: (B,) columns of padding that came after cached tokens, which were moved past them.
    """

    leading: Tensor
    ended: Tensor
    moved: Tensor

    @classmethod
    def none(cls, batch: int, device: torch.device) -> Padding:
        """Of rows that have no padding."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(zeros, zeros.bool(), zeros)

    def map(self, change: Callable[[Tensor], Tensor]) -> Padding:
        """Each tensor changed in the same way."""
        return Padding(change(self.leading), change(self.ended), change(self.moved))

    def to(self, device: torch.device | str) -> Padding:
        """The same on another device."""
        return self.map(lambda x: x.to(device))

    def advance(self, mask: Tensor, seen: int = 0, as_base: bool = False) -> Padding:
        """The padding after new columns with mask (B, n), True for real tokens, that follow `seen` cached ones.

        Args:
            as_base: nothing has left the window or does now, and the base model has the whole mask: real tokens may
                then follow padding on the right.

        Raises:
            AHNError: padding between real tokens.
        """
        some = mask.any(-1)
        first = mask.int().argmax(-1)
        last = mask.shape[1] - 1 - mask.flip(-1).int().argmax(-1)
        gaps = some & (mask.sum(-1) != last - first + 1)
        if bool((gaps if as_base else gaps | (some & self.ended)).any()):
            raise AHNError(
                "attention_mask has padding between real tokens of a row. Pad on the left "
                "(tokenizer.padding_side = 'left'), on a live cache as well."
            )
        # A row with no real token here is paused: its window and memory wait for the next one.
        shift = torch.where(some, first, mask.shape[1])
        moved = self.moved + shift if seen else self.moved
        return Padding(self.leading + shift, self.ended | (some & ~mask[:, -1]), moved)


@dataclasses.dataclass
class Visibility:
    """One forward's view: `length` new tokens after `seen` cached ones, window W, sinks S and C = `quantized`.

    Cached keys lie in index order while `seen ≤ S + W`; afterwards ("rolled") as [S sinks | last W indices]. New keys
    follow. A forward without cache has `seen = 0`.
    """

    window: int
    sinks: int
    seen: int
    length: int
    device: torch.device
    before: Padding | None = None
    after: Padding | None = None
    quantized: int = 0
    reach: int = 0
    """From where on sinks are seen at other positions than their own (`AHNConfig.reach`); 0 for never."""
    rotation: Rotation | None = None
    """Of the base model; None where it is not known, and then nothing is seen elsewhere."""
    in_columns: bool = False
    """Tokens wait beside the window, before this forward or after it, and slots have no place for them."""

    def on(self, device: torch.device) -> Visibility:
        """The same view for layers on another device, made once for all of them: a model may lie on several."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            before, after = (None if x is None else x.to(device) for x in (self.before, self.after))
            self._elsewhere[device] = dataclasses.replace(self, device=device, before=before, after=after)
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Visibility]:
        return {}

    @cached_property
    def shared(self) -> dict[Any, Any]:
        """What others work out from this view once for all layers, by keys of theirs."""
        return {}

    @property
    def total(self) -> int:
        """Columns after this forward."""
        return self.seen + self.length

    @cached_property
    def anchor(self) -> tuple[int, ...]:
        """By how far the sinks of each row (or of all rows) are moved along for this forward's queries.

        Raises:
            AHNError: the forward spans positions at which sinks are not in one place.
        """
        if not self.reach or self.rotation is None or self.total <= self.reach:
            return (0,)
        if not self.padded:  # plain numbers: a GPU is not waited for
            first, last = ((anchor_at(at, self.reach),) for at in (self.seen, self.total - 1))
        else:
            ends = self.lengths_before, torch.maximum(self.lengths_before, self.lengths_after - 1)
            first, last = (tuple(anchors(end, self.reach).tolist()) for end in ends)
        if first != last:
            raise AHNError(
                f"This forward of {self.length} tokens goes beyond the {self.reach} positions that the base model can "
                "be trusted with, all at once. Read under torch.no_grad() with a cache (the default): the text is then "
                "read in chunks; cut training samples shorter; or, to place sinks as published, use max_distance=0."
            )
        return last

    @property
    def rolled(self) -> bool:
        """The cached keys are [sinks | window], not everything."""
        return self.seen > self.lossless

    @property
    def cached(self) -> int:
        """Number of cached key slots before this forward."""
        return min(self.seen, self.lossless)

    @property
    def evicted(self) -> int:
        """Number of tokens that leave the window during this forward; the last `evicted` queries read the memory."""
        return max(0, min(self.length, self.total - self.sinks - self.window))

    @property
    def lossless(self) -> int:
        """Columns up to which nothing leaves the window."""
        return self.sinks + self.window

    @property
    def delayed(self) -> Visibility:
        """The memory's view: what left the window reaches it `quantized` tokens later, as from a wider window."""
        return self._delayed if self.quantized else self

    @cached_property
    def _delayed(self) -> Visibility:
        return dataclasses.replace(self, window=self.window + self.quantized, quantized=0)

    @cached_property
    def beginning(self) -> Tensor:
        """(B or 1,) rows whose first token leaves the window."""
        return (self.lengths_before <= self.lossless) & (self.lengths_after > self.lossless)

    @cached_property
    def begins(self) -> bool:
        """Whether a row's first token leaves the window."""
        return bool(self.beginning.any()) if self.padded else self.seen <= self.lossless < self.total

    @cached_property
    def shift(self) -> Tensor | None:
        """(B,) columns of new left padding that cached tokens must move past, or None when no row has any."""
        if self.before is None or self.after is None or not self.moved:
            return None
        shift = self.after.leading - self.before.leading
        return shift if bool(shift.any()) else None

    @cached_property
    def moved(self) -> bool:
        """Some cached token is not in its own column: the base model's mask and positions do not fit."""
        return self.after is not None and bool(self.after.moved.any())

    @cached_property
    def padded(self) -> bool:
        """Some row has leading padding."""
        return self.after is not None and bool(self.after.leading.any())

    def _pads(self) -> Tensor:
        """(B, 1) leading padding after this forward; (1, 1) zeros for an unpadded batch."""
        if not self.padded:
            return torch.zeros(1, 1, dtype=torch.long, device=self.device)
        assert self.after is not None
        return self.after.leading[:, None]

    def _lengths(self) -> Tensor:
        """(B, 1) real tokens of each row before this forward; (1, 1) for an unpadded batch."""
        if not self.padded or self.before is None:
            return torch.full((1, 1), self.seen, device=self.device)
        return self.seen - self.before.leading[:, None]

    def _indices(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device)[None]

    @cached_property
    def query_positions(self) -> Tensor:
        """(B or 1, length) positions of the new tokens; negative for padding."""
        return self._indices(self.seen, self.total) - self._pads()

    @property
    def column_positions(self) -> Tensor:
        """(B or 1, length) of the new tokens as rotary embeddings take them: columns, less those tokens moved past."""
        columns = self._indices(self.seen, self.total)
        return columns if self.after is None else columns - self.after.moved[:, None]

    @cached_property
    def key_positions(self) -> Tensor:
        """(B or 1, cached + length) position of the token in each key slot, -1 where there is none."""
        pads = self._pads()
        if not self.rolled:
            return (self._indices(0, self.total) - pads).clamp_min(-1)
        sinks = self._indices(0, self.sinks)
        sinks = torch.where(sinks < self._lengths(), sinks, -1)
        # Sinks are seen in their own slots, unless this forward brings them.
        others = self._indices(self.seen - self.window, self.total) - pads
        others = torch.where(others >= self._lengths().clamp_max(self.sinks), others, -1)
        return torch.cat([sinks, others], dim=1)

    @cached_property
    def mask(self) -> Tensor:
        """(B or 1, 1, length, cached + length) True where a query sees a key: sinks, or within the window, causal.

        Padding sees only itself: a softmax over nothing would be NaN and spread.
        """
        queries, keys = self.query_positions[:, :, None], self.key_positions[:, None, :]
        seen = (keys >= 0) & (keys <= queries) & ((keys < self.sinks) | (keys > queries - self.window))
        if self.padded:
            own = torch.arange(keys.shape[-1], device=self.device) - self.cached
            seen = seen | (own == torch.arange(queries.shape[1], device=self.device)[:, None])
        return seen[:, None]

    @cached_property
    def until(self) -> Tensor:
        """(1, 1, cached + length) int32: the first new token that does not see a column any more; only without padding.

        The same as `mask`, in the form of `ahn.attend.spans.attend`.
        """
        assert not self.padded
        keys = self.key_positions
        return torch.where(keys < self.sinks, FOR_EVER, keys + self.window - self.seen).int()[None]

    @cached_property
    def in_slots(self) -> bool:
        """A single token after the window is full replaces the one that leaves; nothing else is copied."""
        starts_tier = self.quantized > 0 and self.begins  # the mean of the first window is taken in columns
        return self.length == 1 and self.rolled and self.shift is None and not (starts_tier or self.in_columns)

    @property
    def held_mask(self) -> Tensor | None:
        """Mask (B or 1, 1, length, keys) over the keys as a cache holds them; None if every key is visible."""
        return self.slot_mask if self.in_slots else self.mask

    @cached_property
    def new_slot(self) -> Tensor:
        """(B or 1, 1) the fixed slot that a single new token takes; see `Slots`."""
        return Slots(self.window, self.sinks).of(self._lengths())

    @cached_property
    def slot_mask(self) -> Tensor | None:
        """Mask (B, 1, 1, S + W) of one query over fixed slots that hold its own key already; None: all are visible."""
        if not self.padded:
            return None
        return (self._indices(0, self.lossless) <= self._lengths())[:, None, None, :]

    @cached_property
    def lengths_before(self) -> Tensor:
        """(B or 1,) real tokens of each row before this forward."""
        return self._lengths()[:, 0]

    @cached_property
    def lengths_after(self) -> Tensor:
        """(B or 1,) real tokens of each row after this forward."""
        return self.total - self._pads()[:, 0]

    def evicted_slots(self, x: Tensor) -> Tensor:
        """Of x (B, H, cached + length, ...): the tokens that leave, in order (B, H, evicted, ...)."""
        return x[:, :, self.sinks : self.sinks + self.evicted]

    @cached_property
    def writable(self) -> Tensor | None:
        """(B, evicted) True for evicted slots that hold a real token not written before; None if all do."""
        if not self.padded:
            return None
        first = self.seen - self.window if self.rolled else self.sinks
        positions = self._indices(first, first + self.evicted) - self._pads()
        return positions >= (self._lengths() - self.window).clamp_min(self.sinks)

    @cached_property
    def written(self) -> Tensor:
        """(B or 1, evicted) tokens in the memory when each of the last `evicted` queries reads it."""
        queries = self.query_positions[:, self.length - self.evicted :]
        return queries - (self.window + self.sinks) + 1

    def align(self, x: Tensor) -> Tensor:
        """Move each row's cached tokens past its new left padding: x (B, H, cached + length, ...) in slot order."""
        if self.shift is None:
            return x
        first = self.sinks if self.rolled else 0
        slots = torch.arange(x.shape[2], device=x.device)[None]
        moved = slots - self.shift[:, None]
        source = torch.where((slots >= first) & (moved < self.cached), moved.clamp_min(first), slots)
        return gather(x, source)

    def keep(self, x: Tensor) -> Tensor:
        """What stays cached of x (B, H, cached + length, ...): all of it, or [sinks | window]; and what comes after."""
        if self.total <= self.lossless:
            return x
        return join([self._keep_sinks(x), x[:, :, self.cached + self.length - self.window :]])

    def _keep_sinks(self, x: Tensor) -> Tensor:
        if not self.padded:
            return x[:, :, : self.sinks]
        slots = self._indices(0, self.sinks)
        source = slots + self._pads()
        if self.rolled:
            arriving = source - self.seen + self.cached
            source = torch.where(slots < self._lengths(), slots, arriving)
        return gather(x, source.clamp(0, x.shape[2] - 1))

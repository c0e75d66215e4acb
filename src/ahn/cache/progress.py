"""How much a conversation has read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ahn.errors import AHNError
from ahn.layout.visibility import Padding, Visibility


class Progress:
    """How much a conversation has read: said here alone, for its cache and all of its layers.

    It moves on when a forward is over, not layer by layer.

    Attributes:
        seen: columns of the batch so far, padding included.
        lengths: (B or 1,) real tokens of each row so far while the tokens lie in fixed slots, else None. A captured
            step changes it in place.
        anchor: by how far the sinks of each row (or of all rows) are moved along; see `Visibility.anchor`.
        waiting: the last so many tokens wait beside the window: `crop` can take them out again.
        beside: so many of the last tokens, all that wait among them, lie beside slots (`LayerState.beside`): captured
            steps of several tokens put them there.
        recording: what is read now may have to be taken out, until `crop` is called.
        undoable: of the next forward's tokens only the last so many; None for all.
        given_again: the next forward is given so many tokens that were read before: transformers' generation does not
            look whether a cache has read some of a prompt where tokens are guessed ahead.
        whole_mask: (B, columns) of the text that is gone on with, where `generate` is given the end of its tokens
            alone: transformers cuts a mask to as many columns as it has tokens where they are guessed ahead.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing was read."""
        self.seen = 0
        self.lengths: Tensor | None = None
        self.anchor: tuple[int, ...] = (0,)
        self.waiting, self.beside, self.recording, self.given_again = 0, 0, False, 0
        self.undoable: int | None = None
        self.whole_mask: Tensor | None = None
        self._recorded = 0  # tokens read since `crop` was called
        self._padding: Padding | None = None
        self._padding_behind = False
        self._known = 0  # columns that `_padding` speaks of

    @property
    def padding(self) -> Padding | None:
        """Of the rows so far; None while no row has any."""
        if self._padding_behind:
            self._padding_behind = False
            assert self.lengths is not None
            leading = self.seen - self.lengths
            if self._padding is not None or bool(leading.any()):
                before = self._padding or Padding.none(len(leading), leading.device)
                moved = before.moved + leading - before.leading
                self._padding = Padding(leading, before.ended, moved)
            self._known = self.seen
        return self._padding

    @padding.setter
    def padding(self, padding: Padding | None) -> None:
        self._padding, self._padding_behind, self._known = padding, False, self.seen

    def row_lengths(self) -> Tensor:
        """(B or 1,) real tokens of each row so far."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((1,), self.seen) if self.padding is None else self.seen - self.padding.leading

    def length_bounds(self) -> tuple[int, int] | None:
        """The fewest and the most real tokens that a row can have; None where only the device can tell.

        Steps ask for these first: a GPU that is asked about padding at every step waits for the host each time.
        """
        return None if self._padding is not None else (self._known if self._padding_behind else self.seen, self.seen)

    @property
    def recorded(self) -> int:
        """The last so many tokens may have to be taken out again: those that wait, and what the window still holds."""
        return self._recorded if self.recording else 0

    def to_record(self, length: int) -> int:
        """How many of the last tokens may have to be taken out again once the next `length` are read."""
        if not self.recording:
            return 0
        last = length if self.undoable is None else min(length, self.undoable)
        return last if last < length else self._recorded + length

    def finish(self, view: Visibility) -> None:
        """A forward is over."""
        self._recorded = self.to_record(view.length)
        self.waiting = min(self._recorded, max(0, view.total - view.lossless))
        self.seen, self.padding, self.anchor, self.beside = view.total, view.after, view.anchor, 0
        self.lengths = view.lengths_after if view.in_slots else None

    def finish_step(self, lengths: Tensor, masked: bool) -> None:
        """A captured step is over.

        Args:
            lengths: (B,) real tokens of each row now; the next step changes it in place.
            masked: the step had an attention mask, which only the device has looked at.
        """
        self.seen, self.lengths = self.seen + 1, lengths
        self._padding_behind |= masked

    def finish_several(self, length: int, beside: int, lossless: int) -> None:
        """A captured step of several tokens is over, or what lay beside the slots has come into them (length 0).

        Args:
            beside: tokens that lie beside the slots now.
            lossless: columns up to which nothing leaves the window.
        """
        if length:
            self._recorded = self.to_record(length)
        self.seen, self.beside, self.lengths = self.seen + length, beside, None
        self.waiting = min(beside, max(0, self.seen - lossless))

    def crop(self, columns: int) -> None:
        """The last columns of the batch were forgotten, none of which had left the window for good."""
        self.waiting, self._recorded = max(0, self.waiting - columns), 0
        self.beside = max(0, self.beside - columns)
        if not columns:
            return
        padding = self.padding  # worked out from what was read before anything was forgotten
        self.seen, self.lengths = max(0, self.seen - columns), None
        self._known = min(self._known, self.seen)
        if padding is not None:
            self.padding = dataclasses.replace(padding, leading=padding.leading.clamp_max(self.seen))

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.padding = None if self.padding is None else self.padding.to(device)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The rows of the batch were reordered, repeated or chosen."""
        padding = self.padding  # worked out from rows that have not moved yet
        if self.lengths is not None and len(self.lengths) > 1:
            self.lengths = change(self.lengths)
        if len(self.anchor) > 1:
            self.anchor = tuple(change(torch.tensor(self.anchor)).tolist())
        self.padding = None if padding is None else padding.map(change)


def new_columns(attention_mask: Tensor | None, seen: int, length: int) -> Tensor | None:
    """The part of a 2-D attention mask that speaks of the new tokens, (B, length) bool.

    Raises:
        AHNError: the mask is not 2-D or does not span cached and new tokens.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise AHNError(
            f"An AHN needs a 2-D attention_mask (batch, tokens), got a {type(attention_mask).__name__}. Multimodal "
            "wrappers make their own masks; use the text model inside (for example AutoModelForCausalLM)."
        )
    check_mask(attention_mask, seen, length)
    return attention_mask[:, -length:].bool()


def check_mask(attention_mask: Tensor, seen: int, length: int) -> None:
    """Raises AHNError unless a mask has a column for each token seen before and each of these."""
    if attention_mask.dim() != 2:
        raise AHNError(f"An AHN needs a 2-D attention_mask (batch, tokens), got {tuple(attention_mask.shape)}.")
    if attention_mask.shape[1] != seen + length:
        raise AHNError(
            f"attention_mask has {attention_mask.shape[1]} columns; expected {seen + length}: {seen} cached tokens and "
            f"{length} new ones."
        )

"""The conversations that are being written: one step of all of them at a time, joining and leaving between steps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn import decode, private
from ahn.cache import rows
from ahn.cache.conversation import AHNCache

TURNS = (16, 64)
"""Tokens of captured steps in which turns are read: fewer take as long, and each size takes seconds to prepare."""


class Batch:
    """Rows of a cache that is made anew when one joins or leaves.

    A row that leaves is replaced by the last one.

    Attributes:
        read: tokens that each row has read.
        sizes: numbers of rows that are prepared once each.
        by_steps: so many tokens of a prompt are read sooner by steps than by a forward of their own.
        turns: tokens that a captured step of several of one conversation reads; none where there is no such step.
    """

    by_steps = 0
    turns: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sizes: list[int] = [1]
        self.read: list[int] = []
        self._cache: AHNCache | None = None

    def __len__(self) -> int:
        return len(self.read)

    @property
    def prepared(self) -> bool:
        """Whether steps of all these rows, and of fewer, have nothing left to prepare."""
        return True

    def add(self, alone: AHNCache) -> None:
        """A conversation becomes the last row; nothing has changed if this fails."""
        self._cache = rows.join([alone] if self._cache is None else [self._cache, alone])
        self.read.append(alone.seen)

    def read_turn(self, alone: AHNCache, ids: Sequence[int]) -> tuple[AHNCache, Tensor]:
        """Read a turn of a conversation, which stays as it is; where there are `turns`.

        Args:
            ids: two tokens or more.

        Returns:
            The conversation with the turn, to be added before another turn is read; logits (1, V) of its next token.
        """
        raise NotImplementedError

    def take(self, row: int, device: torch.device) -> AHNCache:
        """A copy of one row, on a device, as a conversation of its own."""
        assert self._cache is not None
        return rows.take(self._cache, row, device)

    def drop(self, row: int) -> None:
        self.read[row] = self.read[-1]
        self.read.pop()
        if self._cache is not None and self.read:
            left = [len(self.read) if n == row else n for n in range(len(self.read))]
            self._cache.batch_select_indices(torch.tensor(left))
        else:
            self._cache = None

    def prepare(self, like: AHNCache) -> None:
        """Capture what a GPU repeats, for an empty batch of conversations like this one."""
        for count in self.turns:
            self.read_turn(like, [0] * count)
        for size in self.sizes:
            while len(self) < size:
                self.add(like)
            self.step([0] * size)
        self.empty()

    def empty(self) -> None:
        self.clear()

    def clear(self) -> None:
        """All rows are gone, and what they were in: after a step that failed."""
        self.read, self._cache = [], None

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Every row reads a token; logits (rows, V) of the next ones."""
        assert self._cache is not None
        logits = self._forward(self._cache, tokens, self.read)
        self.read = [read + 1 for read in self.read]
        return logits

    def _forward(self, cache: AHNCache, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        ids, positions = (torch.tensor(x, device=self.model.device)[:, None] for x in (tokens, places))
        options = {"position_ids": positions, "use_cache": True, private.CACHE: cache}
        if (mask := rows.mask(cache)) is not None:
            options["attention_mask"] = mask.to(ids.device)
        logits: Tensor = self.model(input_ids=ids, **options).logits[:, -1]
        return logits


class FixedBatch(Batch):
    """Rows in places that never move, for captured steps: one graph for each of a few numbers of rows.

    Rows beyond those in use read token 0 and change nothing but themselves.
    """

    by_steps = 64  # an ordinary forward takes a host 150 ms on Qwen2.5-3B's shape, a captured step 2.2

    def __init__(self, model: PreTrainedModel, capacity: int, turns: bool = False) -> None:
        super().__init__(model)
        if turns:
            self.turns, self.by_steps = TURNS, 256
        self._room: AHNCache | None = None
        self.sizes = [*(1 << n for n in range((capacity - 1).bit_length())), capacity]
        self._views: dict[int, AHNCache] = {}
        self._view: AHNCache | None = None
        """Whose tensors are ahead of the whole batch's."""

    @property
    def prepared(self) -> bool:
        return all(size in self._views for size in self.sizes if size <= self._size())

    def _size(self) -> int:
        return next(size for size in self.sizes if size >= len(self.read))

    def add(self, alone: AHNCache) -> None:
        if self._cache is None:
            self._cache = rows.reserve(alone, self.sizes[-1])
        self._settle()
        rows.put(self._cache, len(self.read), alone)
        self.read.append(alone.seen)

    def read_turn(self, alone: AHNCache, ids: Sequence[int]) -> tuple[AHNCache, Tensor]:
        # A tensor made of numbers waits for all that the device has to do: for nothing yet.
        tokens = torch.tensor([ids], device=self.model.device)
        room = self._room or rows.reserve(alone, 1)
        self._room = None  # not to be used again if what follows fails
        rows.lay(room, alone)
        if room.several is None or not room.several.fits(self.model, room):
            decode.prepare(self.model, room, self.turns)
        # In equal pieces: one of a single token would be a step of another kind, which nobody has prepared.
        for piece in tokens.tensor_split(math.ceil(len(ids) / room.several.sizes[-1]), dim=1):
            options = {"use_cache": True, "logits_to_keep": 1, private.CACHE: room}
            logits: Tensor = self.model(input_ids=piece, **options).logits[:, -1]
        self._room = room
        return room, logits

    def take(self, row: int, device: torch.device) -> AHNCache:
        self._settle()
        return super().take(row, device)

    def drop(self, row: int) -> None:
        self._settle()
        assert self._cache is not None
        last = len(self.read) - 1
        if row != last:
            rows.move(self._cache, last, row)
        self.read[row] = self.read[last]
        self.read.pop()

    def empty(self) -> None:
        self._settle()
        self.read = []

    def clear(self) -> None:
        super().clear()
        self._views, self._view, self._room = {}, None, None

    def step(self, tokens: Sequence[int]) -> Tensor:
        if self._view is None:
            self._view = self._of_size(self._size())
        spare = rows.row_count(self._view) - len(self.read)
        logits = self._forward(self._view, [*tokens, *[0] * spare], [*self.read, *[0] * spare])
        self.read = [read + 1 for read in self.read]
        return logits[: len(self.read)]

    def _of_size(self, size: int) -> AHNCache:
        """The first rows of the batch, as they are now."""
        assert self._cache is not None
        if size not in self._views:
            self._views[size] = rows.prefix(self._cache, size)
        view = self._views[size]
        rows.refresh(self._cache, view)
        rows.set_read(view, [*self.read, *[0] * (size - len(self.read))])
        return view

    def _settle(self) -> None:
        if self._view is not None and self._cache is not None:
            rows.settle(self._cache, self._view)
            self._view = None


def make_batch(model: PreTrainedModel, capacity: int, like: AHNCache) -> Batch:
    """The batch that suits a model."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    alone = rows.join([like])
    captured = decode.runs(model, {"input_ids": ids, private.CACHE: alone})
    return FixedBatch(model, capacity, decode.possible(model, alone)) if captured else Batch(model)

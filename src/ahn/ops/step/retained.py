"""Tokens that a memory keeps (`ahn.memory.retained_tokens`) in a step: keys that attention sees beside the window.

Which of them stay is decided when a block of G is full, outside of steps (`ahn.decode.retained`). In between a step
puts the token that leaves into the block, and reads keys that lie there as queries see them.
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from ahn.layout.state import Tensors
from ahn.ops.step.turn import turned


@dataclasses.dataclass
class SeenTokens:
    """A layer's kept tokens as steps see and change them; M that stayed, and G of the block that fills.

    Attributes:
        keys, values: (B, Hkv, M + G, P) in the model's precision, where the new token's query sees them.
        block_keys, block_values: (B, Hkv, G, P), scores, positions: (B, Hkv, M + G): the memory's own tensors.
        angles: (B, 2, 2, P) cosines and sines that turn the key that leaves to before RoPE, and from there to where the
            query sees it, float32 at least; None where keys stay as they are.
        room: tokens that leave in a text of the length that the base was trained on; 0 where it does not matter.
        places: (H,) int32, where among the Hkv of these tensors each of the model's H key heads is, -1 for one that
            keeps no tokens; None where all do.
    """

    keys: Tensor
    values: Tensor
    block_keys: Tensor
    block_values: Tensor
    scores: Tensor
    positions: Tensor
    angles: Tensor | None = None
    room: int = 0
    places: Tensor | None = None

    @classmethod
    def of(cls, memory: Tensors, slots: int, angles: Tensor | None, room: int, places: Tensor | None = None) -> Self:
        """Over a memory's tensors, with room for so many tokens."""
        own = memory["block_keys"], memory["block_values"], memory["scores"], memory["positions"]
        keys, values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in own[:2])
        return cls(keys, values, *own, angles, room, places)

    @property
    def kept(self) -> int:
        """M."""
        return self.keys.shape[2] - self.block_keys.shape[2]

    @property
    def heads(self) -> Tensor | slice:
        """The model's key heads whose tokens these are."""
        return slice(None) if self.places is None else (self.places >= 0).nonzero()[:, 0]

    def visible(self, left: Tensor) -> Tensor:
        """(B, M + G) which of them a query sees when so many tokens (B,) have left; empty slots are the first of M."""
        filling = left % self.block_keys.shape[2]
        at = torch.arange(self.keys.shape[2], device=left.device) - self.kept
        return (at < filling[:, None]) & (at >= (filling - left)[:, None])

    def bias(self, left: Tensor) -> Tensor:
        """(B,) float32 of their scores when so many tokens (B,) have left; as `ahn.layout.blocks.TextPiece.bias`."""
        if not self.room:
            return left.new_zeros(left.shape, dtype=torch.float32)
        return (self.room / left.clamp_min(1)).clamp_max(1).log()

    def push(self, key: Tensor, value: Tensor, score: Tensor, left: Tensor, position: Tensor, leaves: Tensor) -> None:
        """Take the token that leaves, of rows from which one does and whose block it does not fill.

        Args:
            key, value, score: (B, H, P) and (B, H) of all key heads, as the window or the tier gives them.
            left: (B,) tokens that have left, this one included.
            position: (B,) of this one.
        """
        block, rows = self.block_keys.shape[2], torch.arange(len(left), device=left.device)
        slot, fits = (left - 1) % block, (leaves & (left % block != 0))[:, None]
        key, value, score = (x[:, self.heads] for x in (key, value, score))
        seen = key
        if self.angles is not None:
            key = _turned(key, self.angles[:, 0])
            seen = _turned(key, self.angles[:, 1])
        at = self.kept + slot
        for ring, place, new in (
            (self.keys, at, seen),
            (self.values, at, value),
            (self.block_keys, slot, key),
            (self.block_values, slot, value),
            (self.scores, at, score),
            (self.positions, at, position[:, None]),
        ):
            mask = fits if new.dim() == 2 else fits[..., None]
            ring[rows, :, place] = torch.where(mask, new.to(ring.dtype), ring[rows, :, place])


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, H, P) turned by angles (B, 2, P), rounded once."""
    return turned(x.to(angles.dtype), angles[:, None, 0], angles[:, None, 1]).to(x.dtype)

"""What a step needs to turn keys of the tier that are kept as before RoPE: angles, made once for all layers.

A query sees a token of the tier at the token's own distance, up to a bound. So everything is told from the query: it is
turned back to before RoPE, and then to a distance. Angles of a distance are those of a block's first token and of a
place in the block, so that a kernel turns each key by one of a few angles that it holds, and a query once per block.
"""

import dataclasses
from typing import Self, TypeAlias

import torch
from torch import Tensor

from ahn.layout.rotation import Rotation
from ahn.layout.tier import near_tokens

BLOCK = 64
"""Tokens of a block."""
Angles: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines."""


@dataclasses.dataclass
class TierTurn:
    """Angles of one step, for pairs (i, i + P / 2) of a head's numbers, in float32 at least.

    Attributes:
        token: (B, 3, 2, P) cosines and sines that turn the new token's query to before RoPE, the key that leaves the
            window to before RoPE, and the key that leaves the tier to its position.
        within: (2, BLOCK, P / 2) of 0, 1, … tokens.
        near: (2, · + 1, P / 2) of the distances W, W + BLOCK, …, and last of the farthest at which a token is seen.
        first: (2, ·, P / 2) of the positions S, S + BLOCK, … in a row's first window.
        count: N, the tokens of the tier that are seen at their own distance; those that are older, at the farthest.
    """

    token: Tensor
    within: Tensor
    near: Tensor
    first: Tensor
    count: int

    @classmethod
    def of(
        cls, rotation: Rotation, like: Tensor, rows: int, window: int, sinks: int, capacity: int, reach: int
    ) -> Self:
        """For B rows; `token` is to be filled by `update`.

        Args:
            like: of the type and on the device that angles are wanted in.
            capacity: C.
            reach: the farthest distance at which a token is seen; 0 where each is seen at its own.
        """
        count = near_tokens(capacity, window, reach)

        def angles(positions: Tensor) -> Tensor:
            found = torch.stack(_angles(rotation, like, positions[None])) / rotation.scale
            return found[:, 0, :, : found.shape[-1] // 2].contiguous()

        blocks = [torch.arange(0, length, BLOCK, device=like.device) for length in (count, window)]
        near = torch.cat([window + blocks[0], torch.full((1,), reach, device=like.device)])
        within = angles(torch.arange(BLOCK, device=like.device))
        token = like.new_zeros(rows, 3, 2, 2 * within.shape[-1])
        # Keys of the window have the base's scale, those before RoPE have not.
        return cls(token, within, angles(near), angles(sinks + blocks[1]) / rotation.scale, count)

    def update(self, rotation: Rotation, positions: Tensor, window: int, capacity: int) -> None:
        """For the token at these positions (B,)."""
        at = torch.stack([positions, positions - window, positions - window - capacity], dim=1).clamp_min(0)
        self.token.copy_(torch.stack(_angles(rotation, self.token, at), dim=2))
        self.token[:, 1] /= rotation.scale**2
        self.token[:, :2, 1].neg_()

    def by_age(self, capacity: int) -> Tensor:
        """(2, C, P / 2) of the distance at which the newest token of the tier is seen, the next one, …"""
        far = self.near[:, -1:].expand(-1, capacity - self.count, -1)
        return torch.cat([self.near_by_age(), far], dim=1)

    def near_by_age(self) -> Tensor:
        """(2, N, P / 2) of those that are seen at their own distance."""
        (cos, sin), (near_cos, near_sin) = self.within, self.near[:, :-1, None]
        own = torch.stack([near_cos * cos - near_sin * sin, near_sin * cos + near_cos * sin])
        return own.flatten(1, 2)[:, : self.count]

    def first_window(self, window: int) -> Tensor:
        """(2, W, P / 2) of the positions of a row's first window, over the base's scale."""
        (cos, sin), (first_cos, first_sin) = self.within, self.first[:, :, None]
        both = torch.stack([first_cos * cos - first_sin * sin, first_sin * cos + first_cos * sin])
        return both.flatten(1, 2)[:, :window]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., P) turned by angles (..., P / 2) of its pairs, or (..., P) with each angle twice."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turns_halves(rotation: Rotation, head_dim: int, device: torch.device) -> bool:
    """Whether a base turns all numbers of a head, in pairs (i, i + P / 2): the one way that steps know."""
    x = torch.arange(1.0, head_dim + 1, device=device).view(1, 1, 1, head_dim)
    if rotation.angles(x, torch.arange(3, device=device)[None])[0].shape[-1] != head_dim:
        return False
    angle = torch.arange(head_dim // 2, device=device).repeat(2)[None, None]
    return torch.allclose(rotation.apply(x, x, angle.cos(), angle.sin())[0], turned(x, angle.cos(), angle.sin()))


def _angles(rotation: Rotation, like: Tensor, positions: Tensor) -> Angles:
    """Each (N, T, P), of positions (N, T)."""
    cos, sin = rotation.angles(like, positions)
    return cos.to(like.device), sin.to(like.device)

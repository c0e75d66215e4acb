"""Several states a head: where keys write and queries read is decided by what they point at, not by the time.

A key k and a query q of one head go through a map of their own, k' = k + k M, and share themselves out among the head's
R states by s(k') = softmax(τ k̂' A) and s(q') = softmax(τ q̂' B). State r takes the write gate times s_r(k'), and the
read is the sum of s_r(q') times what state r gives. With A = B at first, a query looks where keys like it went.

Shapes: H query heads, P head dim, R states a head; of states the head is the slower index.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

SHARPNESS = 16.0
"""τ. Of unit vectors in 64 directions random products have a deviation of 1/8: logits of 2."""
L2_EPS = 1e-6


@dataclasses.dataclass
class Routes:
    """Maps (H, P, P), added to the identity, and directions (H, P, R) of the states."""

    query_map: Tensor
    key_map: Tensor
    query_route: Tensor
    key_route: Tensor

    @property
    def states(self) -> int:
        """R."""
        return self.key_route.shape[-1]

    def keys(self, key: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        """Mapped keys (B, H, m, P) in their own type, and the gates of each state, (B, H · R, m) float32.

        Args:
            key: (B, Hkv, m, P).
            write: (B, H, m).
        """
        key = mapped(key.repeat_interleave(len(self.key_map) // key.shape[1], dim=1), self.key_map)
        gates = write.unsqueeze(2) * shares(key, self.key_route).transpose(2, 3)
        return key, gates.flatten(1, 2)

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Mapped queries of (B, H, m, P), and their shares (B, H, m, R) float32."""
        query = mapped(query, self.query_map)
        return query, shares(query, self.query_route)


def mapped(x: Tensor, matrix: Tensor) -> Tensor:
    """x (B, H, m, P) + x M, in the type of x."""
    return x + x @ matrix.to(x.dtype)


def shares(x: Tensor, route: Tensor) -> Tensor:
    """softmax(τ x̂ A), (B, H, m, R), in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = SHARPNESS * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
    with torch.autocast(x.device.type, enabled=False):
        return torch.softmax(scale * (x @ route.to(x.dtype)), dim=-1)


def joined(read: Tensor, share: Tensor) -> Tensor:
    """Reads (B, H · R, m, P) of all states and shares (B, H, m, R) to the reads of the heads, in float32 at least."""
    kind = torch.promote_types(read.dtype, torch.float32)
    return (read.unflatten(1, (share.shape[1], -1)).to(kind) * share.transpose(2, 3).unsqueeze(-1)).sum(2)

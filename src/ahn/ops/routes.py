"""Several states per key head: where keys write and queries read is decided by what they point at, not by the time.

A key k goes through a map of its head, k' = k + k M, and shares itself out among the head's R states by
s(k') = softmax(τ k̂' A): state r takes the write gate times s_r(k'). All query heads of a key head read its states, each
with a map N and directions B of its own: the sum of s_r(q') times what state r gives. With B = A at first, a query
looks where keys like it went.

Shapes: H query heads, Hkv key heads, P head dim, R states per key head; of states the head is the slower index.
"""

import dataclasses

import torch
from torch import Tensor

SHARPNESS = 16.0
"""τ. Of unit vectors in 64 directions random products have a deviation of 1/8: logits of 2."""
L2_EPS = 1e-6


@dataclasses.dataclass
class Routes:
    """Maps, added to the identity, and directions of the states.

    Attributes:
        query_map: (H, P, P), N.
        key_map: (Hkv, P, P), M.
        query_route: (H, P, R), B.
        key_route: (Hkv, P, R), A.
    """

    query_map: Tensor
    key_map: Tensor
    query_route: Tensor
    key_route: Tensor

    @property
    def states(self) -> int:
        """R."""
        return self.key_route.shape[-1]

    def keys(self, key: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        """Mapped keys (B, Hkv, m, P) in their own type, and the gates of each state, (B, Hkv · R, m) float32.

        Args:
            key: (B, Hkv, m, P).
            write: (B, Hkv, m).
        """
        key = mapped(key, self.key_map)
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


def repeated(query: Tensor, heads: int, states: int) -> Tensor:
    """Queries (B, H, ...) for each state that they read: (B, heads · R · H / heads, ...), one state's together."""
    readers = query.unflatten(1, (heads, 1, -1))
    return readers.expand(-1, -1, states, *readers.shape[3:]).flatten(1, 3)


def joined(read: Tensor, share: Tensor, heads: int) -> Tensor:
    """Reads as `repeated` orders them, (..., m, P), by their shares (B, H, m, R): (B, H, m, P), float32 at least."""
    kind = torch.promote_types(read.dtype, torch.float32)
    share = share.to(kind).unflatten(1, (heads, -1)).movedim(-1, 2).unsqueeze(-1)
    return (read.to(kind).view(*share.shape[:-1], read.shape[-1]) * share).sum(2).flatten(1, 2)

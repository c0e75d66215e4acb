"""Which blocks of queries and keys see each other, for the kernels of `ahn.attend.spans`, and how large blocks are."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.ops.backend import shared_memory


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys of one block, and how Triton runs its program."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(kernel: str, query: Tensor) -> Tiles:
    """Block sizes for "forward", "queries" or "keys" (of the backward pass)."""
    P = query.shape[-1]
    if query.dtype == torch.float32:  # without tensor cores registers are what limits
        return Tiles(16, 32, 4, 1) if P > 32 else Tiles(32, 32, 4, 1)
    if shared_memory(query.device) < 200 * 1024:  # before Hopper, and GPUs for one user
        return Tiles(64, 32, 4, 2) if P > 64 else Tiles(64, 64, 4, 2)
    if P > 64:
        return Tiles(64, 128, 8, 3) if kernel == "keys" else Tiles(128, 64, 8, 3)
    return Tiles(128, 64, 4, 3) if kernel == "forward" else Tiles(64, 64, 4, 3)


@dataclasses.dataclass
class Blocks:
    """Which blocks see each other: for each of `rows` blocks the others, wholly visible ones first.

    Attributes:
        index: (B or 1, Hkv or 1, rows, columns) int32.
        count: (B or 1, Hkv or 1, rows, 2) int32, of the wholly visible and of all visible ones.
    """

    index: Tensor
    count: Tensor

    @cached_property
    def order(self) -> Tensor:
        """(B or 1, Hkv or 1, rows) int32, the blocks that see most first."""
        return self.count[..., 1].argsort(dim=-1, descending=True, stable=True).int()


def blocks(until: Tensor, n: int, tile: Tiles, by_key: bool) -> Blocks:
    """Lists for each block of queries, or with `by_key` for each block of keys."""
    T, M, N = until.shape[-1], tile.queries, tile.keys
    first = torch.arange(0, n, M, device=until.device)[:, None]  # query of each block
    own = torch.arange(0, T, N, device=until.device) - (T - n)  # query whose own token is each block's first
    ends = F.pad(until, (0, -T % N)).unflatten(-1, (-1, N))[..., None, :, :]  # 0 beyond T: not wholly visible
    some = (own < (first + M).clamp_max(n)) & (ends.amax(-1) > first)
    whole = (own + N - 1 <= first) & (ends.amin(-1) >= first + M) & (first + M <= n)
    rank = some.byte() + (some & whole).byte()
    rank = rank.mT if by_key else rank
    index = rank.argsort(dim=-1, descending=True, stable=True).int()
    return Blocks(index.contiguous(), torch.stack([(rank == 2).sum(-1), (rank > 0).sum(-1)], -1).int())


@dataclasses.dataclass
class Columns:
    """When each column is seen, with what the kernels make of it once for all layers of a forward.

    Attributes:
        until: (B or 1, Hkv or 1, T) int32, as `attend` takes it.
        queries: n.
    """

    until: Tensor
    queries: int

    @classmethod
    def of_band(cls, held: int, queries: int, width: int, device: torch.device) -> Columns:
        """Of tokens in the order of the text, `held` before the first query's own: each query sees the last `width`."""
        own = torch.arange(-held, queries, device=device, dtype=torch.int32)
        return cls((own + width)[None, None], queries)

    def lists(self, tile: Tiles, by_key: bool = False) -> Blocks:
        """Which blocks see each other."""
        if (tile, by_key) not in self._lists:
            self._lists[tile, by_key] = blocks(self.until, self.queries, tile, by_key)
        return self._lists[tile, by_key]

    @cached_property
    def _lists(self) -> dict[tuple[Tiles, bool], Blocks]:
        return {}

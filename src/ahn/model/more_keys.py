"""Keys that exact attention sees besides sinks and window, of a tier or a memory: joined to them, and masks of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.attend import masked
from ahn.attend.merge import joined
from ahn.attend.part import Part
from ahn.cache.tier import Seen
from ahn.memory.base import MemoryKeys, SeenKeys


def parts_of_memory(query: Tensor, key_heads: int, made: MemoryKeys | None, scaling: float) -> list[Part]:
    """Attention of queries (B, Hq, n, P) over the keys that a memory has made, for so many key heads."""
    if made is None:
        return []
    pieces = []
    for x in made.pieces:
        some = query[:, :, x.first : x.last]
        heads = None if x.heads is None else _query_heads(x.heads, query.shape[1] // key_heads)
        own = some if heads is None else some.index_select(1, heads)
        parts = masked.parts(own, x.key, x.value, x.visible, scaling)
        if x.bias is not None:
            parts = [Part(part.out, part.score + x.bias[:, None]) for part in parts]
        pieces.append(parts if heads is None else [_among_all(part, heads, some) for part in parts])
    if len({len(parts) for parts in pieces}) > 1:
        pieces = [[joined(parts)] for parts in pieces]
    return [masked.joined(list(parts)) for parts in zip(*pieces, strict=True)]


def _query_heads(key_heads: Tensor, groups: int) -> Tensor:
    """The query heads that share these key heads, in order."""
    return (key_heads[:, None] * groups + torch.arange(groups, device=key_heads.device)).flatten()


def _among_all(part: Part, heads: Tensor, query: Tensor) -> Part:
    """A part of these heads as one of all of query (B, Hq, n, P): the others see none of its keys."""
    score = part.score.new_full(query.shape[:3], masked.UNSEEN)
    return Part(torch.zeros_like(query).index_copy(1, heads, part.out), score.index_copy(1, heads, part.score))


def of_all_heads(more: SeenKeys, count: int) -> Seen:
    """A memory's keys for so many key heads: those that are not its own have zeros that nobody sees."""
    visible = masked.of_all_keys(more.visible, more.key.shape[2])
    if more.heads is None:
        return Seen(more.key, more.value, visible)
    all_heads = []
    for x in (more.key, more.value, visible.expand(-1, len(more.heads), -1, -1)):
        empty = x.new_zeros(x.shape[0], count, *x.shape[2:])
        all_heads.append(empty.index_copy(1, more.heads, x))
    return Seen(*all_heads)


def with_more_keys(key: Tensor, value: Tensor, more: Seen) -> tuple[Tensor, Tensor]:
    """Keys and values with more before them."""
    return torch.cat([more.key, key], dim=2), torch.cat([more.value, value], dim=2)


def with_more_masks(mask: Tensor | None, count: int, more: Seen) -> Tensor | None:
    """The mask (B or 1, 1 or Hkv, n, T) of so many keys with more before them; None where all are seen."""
    known = more.visible if mask is None else mask
    if known is None:
        return None
    parts = [
        known.new_ones(1, 1, known.shape[2], size) if visible is None else visible
        for size, visible in ((more.key.shape[2], more.visible), (count, mask))
    ]
    batch, heads = (max(part.shape[dim] for part in parts) for dim in (0, 1))
    return torch.cat([part.expand(batch, heads, -1, -1) for part in parts], dim=-1)


def as_kernel_mask(mask: Tensor | None, kernel: str, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as "sdpa" takes it, or as "eager" adds it to the scores; one that is added already stays."""
    if mask is None or kernel == "sdpa" or mask.dtype != torch.bool:
        return mask
    return as_added(mask, kernel, dtype)


def as_added(mask: Tensor, kernel: str, dtype: torch.dtype) -> Tensor:
    """A mask as one that is added to the scores; "sdpa" makes the same of it, in every layer anew."""
    if mask.dtype != torch.bool:
        return mask
    least = -torch.inf if kernel == "sdpa" else torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, least)


def aligned(mask: Tensor) -> Tensor:
    """The same with rows that begin at a multiple of 16 numbers, as kernels want them: torch would copy it for each."""
    return F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]


def with_bias(mask: Tensor, bias: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """A boolean mask (B or 1, 1 or Hkv, n, T) as one that is added, with bias (B or 1, n) for the first of the keys."""
    batch = max(mask.shape[0], bias.shape[0])
    added = F.pad(bias.to(dtype)[:, None, :, None].expand(-1, -1, -1, keys), (0, mask.shape[-1] - keys))
    return added.expand(batch, *mask.shape[1:]).masked_fill(~mask, torch.finfo(dtype).min)

"""Attention over few keys with a mask per query and key, which also says its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from ahn.attend.merge import Part

QUERIES = 1024
"""At once: scores are written out."""
UNSEEN = -1e30
"""The score of a key that a query does not see: of one that sees none of them the result counts nothing, and is no
NaN."""


def part(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Part:
    """Attention of n queries over C keys, without gradients.

    Args:
        query: (B, Hq, n, P); key, value: (B, Hkv, C, P) with Hq a multiple of Hkv.
        visible: (B or 1, 1 or Hkv, n, C) bool.
        scaling: of the scores.
    """
    pairs = zip(query.split(QUERIES, dim=2), visible.split(QUERIES, dim=2), strict=True)
    parts = [_part(some, key, value, seen, scaling) for some, seen in pairs]
    return parts[0] if len(parts) == 1 else joined(parts)


def joined(parts: list[Part]) -> Part:
    """Parts of queries that follow each other."""
    return Part(torch.cat([part.out for part in parts], dim=2), torch.cat([part.score for part in parts], dim=2))


def _part(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Part:
    B, Hkv, C, P = key.shape
    n = query.shape[2]
    scores = _scores(query.reshape(B * Hkv, -1, P), key.reshape(B * Hkv, C, P)).view(B, Hkv, -1, n, C)
    scores = scores.mul_(scaling).masked_fill_(~visible.unsqueeze(2), UNSEEN)
    highest = scores.logsumexp(-1, keepdim=True)
    weights = scores.sub_(highest).exp_().to(value.dtype).view(B * Hkv, -1, C)
    out = (weights @ value.reshape(B * Hkv, C, P)).view(B, -1, n, P)
    return Part(out, highest.float().view(B, -1, n))


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Products (N, Q, C) of half-precision vectors, added up and returned in float32; of others in their own type."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return query @ key.mT
    return torch.bmm(query, key.mT, out_dtype=torch.float32) if query.is_cuda else query.float() @ key.float().mT

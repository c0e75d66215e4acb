"""Join attention over disjoint sets of keys: each part's output counts by the exponential of its log-sum-exp."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Part:
    """Attention of n queries over some keys.

    Attributes:
        out: (B, H, n, P).
        score: (B, H, n) float32, log-sum-exp of the scores.
        turned: the queries are in reverse order.
    """

    out: Tensor
    score: Tensor
    turned: bool = False


def merge(parts: list[Part]) -> Tensor:
    """Attention over all keys of two or three parts: (B, H, n, P), laid out as (B, n, H, P)."""
    if parts[0].out.is_cuda:
        from ahn.ops import merge_triton

        with torch.cuda.device(parts[0].out.device):
            return merge_triton.merge(parts)
    return plain(parts)


def plain(parts: list[Part]) -> Tensor:
    """`merge` in plain torch."""
    outs = torch.stack([part.out.flip(2) if part.turned else part.out for part in parts]).float()
    scores = torch.stack([part.score.flip(2) if part.turned else part.score for part in parts])
    merged = (outs * scores.softmax(0).unsqueeze(-1)).sum(0).to(parts[0].out.dtype)
    return merged.transpose(1, 2).contiguous().transpose(1, 2)

"""Join attention over disjoint sets of keys: each part's output counts by the exponential of its log-sum-exp."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass
class Part:
    """Attention of m queries over some keys: of all n queries, or of the first m; the others see none of these keys.

    Attributes:
        out: (B, H, m, P).
        score: (B, H, m) float32, log-sum-exp of the scores.
        turned: the queries are in reverse order.
    """

    out: Tensor
    score: Tensor
    turned: bool = False


def merge(parts: list[Part]) -> Tensor:
    """Attention over all keys of two or three parts, the first of all queries: (B, H, n, P), laid out (B, n, H, P)."""
    if parts[0].out.is_cuda:
        from ahn.ops import merge_triton

        with torch.cuda.device(parts[0].out.device):
            return merge_triton.merge(parts)
    return plain(parts)


def plain(parts: list[Part]) -> Tensor:
    """`merge` in plain torch."""
    n = parts[0].out.shape[2]
    ordered = [(part.out.flip(2), part.score.flip(2)) if part.turned else (part.out, part.score) for part in parts]
    outs = torch.stack([F.pad(out.float(), (0, 0, 0, n - out.shape[2])) for out, _ in ordered])
    scores = torch.stack([F.pad(score, (0, n - score.shape[2]), value=-torch.inf) for _, score in ordered])
    merged = (outs * scores.softmax(0).unsqueeze(-1)).sum(0).to(parts[0].out.dtype)
    return merged.transpose(1, 2).contiguous().transpose(1, 2)

"""Attention over some of the keys, and joined over all: each part counts by the exponential of its log-sum-exp."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.attend.part import Part
from ahn.ops.quantize import precise

AT_ONCE = 3
"""Parts that the kernel joins."""


def merge(parts: list[Part]) -> Tensor:
    """Attention over all keys of some parts, the first of all queries: (B, H, n, P).

    That of several parts is laid out as (B, n, H, P).
    """
    if len(parts) == 1:
        return parts[0].out
    if len(parts) > AT_ONCE:
        return merge([joined(parts[:AT_ONCE]), *parts[AT_ONCE:]])
    if parts[0].out.is_cuda and parts[0].out.dtype != torch.float64:  # which the kernel would add up in float32
        from ahn.attend import merge_kernel

        with torch.cuda.device(parts[0].out.device):
            return merge_kernel.merge(parts)
    return plain(parts)


def plain(parts: list[Part]) -> Tensor:
    """`merge` in plain torch, added up in float32 at least."""
    n, kind = parts[0].out.shape[2], precise(parts[0].out.dtype)
    ordered = [(part.out.flip(2), part.score.flip(2)) if part.reversed else (part.out, part.score) for part in parts]
    outs = torch.stack([F.pad(out.to(kind), (0, 0, 0, n - out.shape[2])) for out, _ in ordered])
    scores = torch.stack([F.pad(score, (0, n - score.shape[2]), value=-torch.inf) for _, score in ordered]).to(kind)
    merged = (outs * scores.softmax(0).unsqueeze(-1)).sum(0).to(parts[0].out.dtype)
    return merged.transpose(1, 2).contiguous().transpose(1, 2)


def joined(parts: list[Part]) -> Part:
    """Several parts as one."""
    if len(parts) == 1:
        return parts[0]
    n = parts[0].score.shape[2]
    ordered = [part.score.flip(2) if part.reversed else part.score for part in parts]
    scores = torch.stack([F.pad(score, (0, n - score.shape[2]), value=-torch.inf) for score in ordered])
    return Part(merge(parts), scores.logsumexp(0))

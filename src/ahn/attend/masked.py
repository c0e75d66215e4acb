"""Attention over few keys with a mask per query and key, which also says its log-sum-exp."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn import private
from ahn.attend import windowed
from ahn.attend.part import Part
from ahn.ops.quantize import precise

QUERIES = 1024
"""At once: scores are written out."""
UNSEEN = -1e30
"""The score of a key that a query does not see: of one that sees none of them the result counts nothing, and is no
NaN."""


def parts(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> list[Part]:
    """Attention of n queries over C keys, without gradients: over those that all see apart, where a kernel does them.

    Args:
        query: (B, Hq, n, P); key, value: (B, Hkv, C, P) with Hq a multiple of Hkv.
        visible: (B or 1, 1 or Hkv, n, C') bool, of the last C' keys; all queries see those before.
        scaling: of the scores.
    """
    first = key.shape[2] - visible.shape[-1]
    certain = []
    if first and (query.device.type == "cpu" or windowed.supported(query)):
        certain = [_certain(query, key[:, :, :first], value[:, :, :first], scaling)]
        key, value = key[:, :, first:], value[:, :, first:]
    visible = of_all_keys(visible, key.shape[2])
    pairs = zip(query.split(QUERIES, dim=2), visible.split(QUERIES, dim=2), strict=True)
    return [*certain, joined([_part(some, key, value, seen, scaling) for some, seen in pairs])]


def of_all_keys(visible: Tensor, count: int) -> Tensor:
    """Of the last of so many keys (B, H, n, C') as one of all (B, H, n, C): those before are seen."""
    return F.pad(visible, (count - visible.shape[-1], 0), value=True) if visible.shape[-1] < count else visible


def joined(parts: list[Part]) -> Part:
    """Parts of queries that follow each other."""
    if len(parts) == 1:
        return parts[0]
    return Part(torch.cat([part.out for part in parts], dim=2), torch.cat([part.score for part in parts], dim=2))


def _certain(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Part:
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, None, scaling)
    return Part(*private.flash_attention(query, key, value, False, scaling))


def _part(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Part:
    return (_on_cpu if query.device.type == "cpu" else written_out)(query, key, value, visible, scaling)


def written_out(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Part:
    """With all scores in memory, which is what takes the time: they are gone through as seldom as can be."""
    B, Hkv, C, P = key.shape
    n = query.shape[2]
    scores = _scores(query.reshape(B * Hkv, -1, P), key.reshape(B * Hkv, C, P)).view(B, Hkv, -1, n, C)
    scores = scores.mul_(scaling).masked_fill_(~visible.unsqueeze(2), UNSEEN)
    weights = scores.softmax(-1).to(value.dtype).view(B * Hkv, -1, C)
    out = (weights @ value.reshape(B * Hkv, C, P)).view(B, -1, n, P)
    return Part(out, scores.logsumexp(-1).view(B, -1, n))


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float) -> Part:
    """By torch's own kernel, for which each key head is a row of the batch: its query heads share one mask."""
    B, Hkv, C, P = key.shape
    n, mask = query.shape[2], None
    if not C:  # the kernel divides by their number
        return Part(torch.zeros_like(query), query.new_full(query.shape[:3], UNSEEN, dtype=precise(query.dtype)))
    if visible is not None:
        mask = (~visible).to(precise(query.dtype)).mul_(UNSEEN)
        mask = mask.expand(B, Hkv, n, C).reshape(B * Hkv, 1, n, C)
    key, value = (x.reshape(B * Hkv, 1, C, P) for x in (key, value))
    out, score = private.attention_of_cpu(query.reshape(B * Hkv, -1, n, P), key, value, False, scaling, mask)
    return Part(out.reshape(B, -1, n, P), score.reshape(B, -1, n))


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Products (N, Q, C) of half-precision vectors, added up and returned in float32; of others in their own type."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return query @ key.mT
    return torch.bmm(query, key.mT, out_dtype=torch.float32) if query.is_cuda else query.float() @ key.float().mT

"""Sinks + window attention for a chunk of queries, from library kernels that know no window.

Of n new queries after a full window, query i sees the sinks, window keys that are at least i + 1 columns in, and the
new keys up to its own. That is a rectangle of S + W - n keys that every query sees whole and two triangles: n × n of
the new keys (causal), n - 1 × n - 1 of the window's oldest ones (causal once queries and keys are turned round). Three
calls of the fastest dense kernel, joined by their log-sum-exps, waste nothing on masks and compile nothing. Every size
is a multiple of the kernel's tile where window, sinks and n are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ahn.ops import has_triton
from ahn.ops.merge import Part, merge
from ahn.ops.moves import join, take
from ahn.visibility import Visibility

BLOCK = 8192  # queries at once; more would make the triangles larger than they need to be
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


def applies(view: Visibility, query: Tensor) -> bool:
    """Whether `attend` can do this forward, and is the faster way."""
    n, P = query.shape[2:]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and not (half and P % 8 == 0 and P <= 128 and has_triton() and _ampere(query.device)):
        return False
    if query.device.type not in ("cuda", "cpu") or torch.is_grad_enabled() or n < 2 or view.seen == 0:
        return False
    if view.padded or view.moved or torch.is_autocast_enabled(query.device.type):
        return False
    if view.seen >= view.sinks + view.window:
        return view.window > 2
    # On a CPU nothing has changed until something leaves the window, to the last bit. On a GPU the base model's own way
    # of reading a later chunk is a dense mask.
    return query.is_cuda and view.evicted == 0


def attend(query: Tensor, keys: Tensor, values: Tensor, view: Visibility, scaling: float) -> Tensor:
    """Attention of n new queries that follow `view.seen` tokens.

    Args:
        query: (B, Hq, n, P); keys, values: (B, Hkv, cached + n, P) in columns.
        view: without padding; either nothing leaves the window, or it is full before the first query.

    Returns:
        (B, Hq, n, P).
    """
    cached, n = view.cached, view.length
    if not view.evicted:
        old = (keys[:, :, :cached], values[:, :, :cached])
        new = (keys[:, :, cached:], values[:, :, cached:])
        return merge([_part(query, *old, False, scaling), _part(query, *new, True, scaling)])
    size = min(BLOCK, view.window - 1)
    blocks = [
        _block(query[:, :, a : a + size], keys, values, a, view.sinks, view.window, scaling) for a in range(0, n, size)
    ]
    return blocks[0] if len(blocks) == 1 else join(blocks)


def _block(query: Tensor, keys: Tensor, values: Tensor, start: int, sinks: int, window: int, scaling: float) -> Tensor:
    """Queries `start` and following, at most window - 1 of them."""
    m = query.shape[2]
    first = sinks + start  # the oldest column that the block's first query does not see any more
    rest, own = slice(first + m, first + window), slice(first + window, first + window + m)
    whole = [join([x[:, :, :sinks], x[:, :, rest]]) if sinks else x[:, :, rest] for x in (keys, values)]
    parts = [
        _part(query, keys[:, :, own], values[:, :, own], True, scaling),
        _part(query, whole[0], whole[1], False, scaling),
    ]
    if m > 1:
        parts.append(_oldest(query, keys, values, first, scaling))
    return merge(parts)


def _oldest(query: Tensor, keys: Tensor, values: Tensor, first: int, scaling: float) -> Part:
    """The m - 1 keys after column `first`: query i sees all but the first i of them, and the last query none."""
    m = query.shape[2]
    shifted, backwards = _reversed(m, query.device)
    columns = slice(first, first + m)
    turned = [take(query, shifted), take(keys[:, :, columns], backwards), take(values[:, :, columns], backwards)]
    part = _part(turned[0], turned[1], turned[2], True, scaling)
    return Part(part.out[:, :, : m - 1], part.score[:, :, : m - 1], turned=True)


@lru_cache(maxsize=4)
def _reversed(m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The order of m - 1 queries and of their keys, backwards, and one of each too many.

    The key, `first` itself, is last: no other query sees it, and nobody reads its query. The kernel then gets m × m,
    which is made of whole tiles where m - 1 is not.
    """
    backwards = torch.arange(m - 1, -1, -1, device=device)
    return (backwards - 1).clamp_min(0), backwards


def _part(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> Part:
    return Part(*kernel(query)(query, key, value, causal, scaling))


def kernel(query: Tensor) -> Kernel:
    """The dense attention that also says its log-sum-exp: torch's on a CPU, cuDNN's, else FlashAttention-2."""
    if not query.is_cuda:
        return _cpu
    return _cudnn if torch.version.cuda and torch.backends.cudnn.is_available() else _flash


def _ampere(device: torch.device) -> bool:
    """Older GPUs have neither kernel."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    out, score = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scaling
    )
    return out, score


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    out, score, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scaling
    )
    return out, score.reshape(score.shape[:3])


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    out, score, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scaling
    )
    return out, score


def plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """The same written out in float32: what the kernels are compared with."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.mT * scaling
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ value).to(query.dtype), scores.logsumexp(-1)

"""Sinks + window attention for a chunk of queries, from library kernels that know no window.

Of n new queries after a full window, query i sees the sinks, window keys that are at least i + 1 columns in, and the
new keys up to its own. That is a rectangle of S + W - n keys that every query sees whole and two triangles: n × n of
the new keys (causal), n - 1 × n - 1 of the window's oldest ones (causal once queries and keys are reversed). Three
calls of the fastest dense kernel, joined by their log-sum-exps, waste nothing on masks and compile nothing. Every size
is a multiple of the kernel's tile where window, sinks and n are.

Quantized tokens are a second window (`Band`), over the stream of tokens that left the first one: as many parts again.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ahn import private
from ahn.attend.merge import joined, merge
from ahn.attend.part import Part
from ahn.layout.copies import join, take
from ahn.layout.visibility import Visibility
from ahn.ops import has_triton

BLOCK = 8192  # queries at once; more would make the triangles larger than they need to be
WHOLE = 1024  # queries of which a multiple is worth cuDNN's plan: it makes one for each new shape, 20 to 70 ms
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


def applies(view: Visibility, query: Tensor) -> bool:
    """Whether `attend` can do this forward, and is the faster way."""
    if not supported(query) or query.shape[2] < 2 or view.seen == 0 or view.padded or view.moved:
        return False
    if view.seen >= view.sinks + view.window:
        return view.window > 2
    # On a CPU nothing has changed until something leaves the window, to the last bit. On a GPU the base model's own way
    # of reading a later chunk is a dense mask.
    return query.is_cuda and view.evicted == 0


def supported(query: Tensor) -> bool:
    """Whether there are kernels for such queries that say their log-sum-exp; they have no backward."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    P = query.shape[-1]
    if query.is_cuda and not (half and P % 8 == 0 and P <= 128 and has_triton() and _ampere(query.device)):
        return False
    device = query.device.type
    return device in ("cuda", "cpu") and not torch.is_grad_enabled() and not torch.is_autocast_enabled(device)


@dataclasses.dataclass
class Band:
    """A second window, over a stream of tokens in the order of the text: of each query the last `width` up to its own.

    Attributes:
        query: (B, Hq, n, P) as it meets these keys.
        key, value: (B, Hkv, T, P); the last query's own token is the last.
        width: more than 2.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    width: int

    @property
    def held(self) -> int:
        """Tokens before the first query's own; negative if that, and as many queries' less one, are not there yet."""
        return self.key.shape[2] - self.query.shape[2]

    def edges(self) -> tuple[int, int]:
        """The first query that sees a token, and the first that sees as many as ever."""
        return -self.held, self.width - self.held

    def parts(self, start: int, stop: int, scaling: float) -> list[Part]:
        """Attention of queries that lie on one side of each edge."""
        if self.held + start < 0:
            return []
        first = self.held + start - self.width
        return _parts(self.query[:, :, start:stop], self.key, self.value, first, 0, self.width, scaling)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    view: Visibility,
    scaling: float,
    tier: Sequence[Band] = (),
    more: Sequence[Part] = (),
) -> Tensor:
    """Attention of n new queries that follow `view.seen` tokens.

    Args:
        query: (B, Hq, n, P); keys, values: (B, Hkv, cached + n, P) in columns.
        view: without padding; either nothing leaves the window, or it is full before the first query.
        tier: of quantized tokens.
        more: attention of all queries over other keys.

    Returns:
        (B, Hq, n, P).
    """
    cached, n = view.cached, view.length
    if not view.evicted:
        old = (keys[:, :, :cached], values[:, :, :cached])
        new = (keys[:, :, cached:], values[:, :, cached:])
        return merge([_part(query, *old, False, scaling), _part(query, *new, True, scaling), *more])
    size = min(BLOCK, view.window - 1, *(band.width - 1 for band in tier))
    # Whole tiles where there are many; else equal blocks: one of few queries would go through as many keys for little.
    size = size - size % WHOLE if size > WHOLE else -(-n // -(-n // size))
    edges = {edge for band in tier for edge in band.edges() if 0 < edge < n}
    blocks = []
    for start, stop in itertools.pairwise(sorted({*range(0, n, size), n} | edges)):
        exact = _parts(query[:, :, start:stop], keys, values, view.sinks + start, view.sinks, view.window, scaling)
        coarse = [parts for band in tier if (parts := band.parts(start, stop, scaling))]
        coarse += [[part.queries(start, stop)] for part in more]
        blocks.append(merge([joined(parts) for parts in [exact, *coarse]] if coarse else exact))
    return blocks[0] if len(blocks) == 1 else join(blocks)


def _parts(
    query: Tensor, keys: Tensor, values: Tensor, first: int, sinks: int, window: int, scaling: float
) -> list[Part]:
    """Attention of m consecutive queries, at most window - 1.

    Args:
        first: the newest column that the first query does not see any more; negative, by at least m, where the first
            `window` columns are still filling and there are no sinks.
    """
    m = query.shape[2]
    if first < 0:
        own = slice(first + window, first + window + m)
        parts = [_part(query, keys[:, :, own], values[:, :, own], True, scaling)]
        if own.start:
            parts.append(_part(query, keys[:, :, : own.start], values[:, :, : own.start], False, scaling))
        return parts
    rest, own = slice(first + m, first + window), slice(first + window, first + window + m)
    whole = [join([x[:, :, :sinks], x[:, :, rest]]) if sinks else x[:, :, rest] for x in (keys, values)]
    parts = [
        _part(query, keys[:, :, own], values[:, :, own], True, scaling),
        _part(query, whole[0], whole[1], False, scaling),
    ]
    if m > 1:
        parts.append(_oldest(query, keys, values, first, scaling))
    return parts


def _oldest(query: Tensor, keys: Tensor, values: Tensor, first: int, scaling: float) -> Part:
    """The m - 1 keys after column `first`: query i sees all but the first i of them, and the last query none."""
    m = query.shape[2]
    shifted, backwards = _reversed(m, query.device)
    columns = slice(first, first + m)
    flipped = [take(query, shifted), take(keys[:, :, columns], backwards), take(values[:, :, columns], backwards)]
    part = _part(flipped[0], flipped[1], flipped[2], True, scaling)
    return Part(part.out[:, :, : m - 1], part.score[:, :, : m - 1], reversed=True)


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
    """The dense attention that also says its log-sum-exp: torch's on a CPU, cuDNN's, else FlashAttention-2.

    cuDNN makes a plan for every new shape, which takes longer than a chunk of a small model: it gets sizes that come
    again, those of whole chunks.
    """
    if not query.is_cuda:
        return private.attention_of_cpu
    has_cudnn = torch.version.cuda and torch.backends.cudnn.is_available()
    return private.attention_of_cudnn if has_cudnn and query.shape[2] % WHOLE == 0 else private.flash_attention


def kernel_of_one(query: Tensor) -> Kernel:
    """The same for a single query per row: cuDNN wants more than one."""
    return private.flash_attention if query.is_cuda else private.attention_of_cpu


def _ampere(device: torch.device) -> bool:
    """Older GPUs have neither kernel."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """The same written out in float32: what the kernels are compared with."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.mT * scaling
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ value).to(query.dtype), scores.logsumexp(-1)

"""Which key heads find what was said long ago: few of a model do, and they alone need to keep tokens.

A head that copies an answer from far back looks, when the answer is due, at the place where it was said. So heads are
ordered by the attention that queries of replies give to far places where the reply's own words stand, mean over those
queries, in the base model's own full attention (compare retrieval heads, arXiv 2404.15574).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.cache.layer_context import LayerContext
from ahn.errors import AHNError
from ahn.model.adapter import set_window
from ahn.model.attached import attached, observed
from ahn.model.observer import Observer
from ahn.model.route import AttentionCall
from ahn.training.distillation import Batch, model_inputs, unpack
from ahn.training.losses import IGNORED
from ahn.wrappers import decoder_of

QUERIES = 64
"""At once: their probabilities are written out."""
WORDS = 3
"""So many tokens in a row, or a whole shorter reply, that were said before in the same order are taken for copied."""
NEAR = 8
"""Tokens of the reply around the one that is due whose earlier places count: some heads look at a place's beginning."""


@torch.no_grad()
def copied(model: PreTrainedModel, batches: Iterable[Batch], window: int, sinks: int) -> dict[tuple[int, int], float]:
    """How much of its attention each key head gives to the far places where a reply's words were said before, 0 to 1.

    Args:
        model: with a memory attached, of any kind. It keeps the given window afterwards.
        batches: as for `distillation_loss`; the queries are those that predict a token with a label.
        window: W; a token is far at a distance of W or more.
        sinks: S; the first S tokens are never far.

    Returns:
        By (layer, key head), of the layers with a memory; of a key head the query head that gives most.

    Raises:
        AHNError: no reply says again what was said far before.
    """
    watch = _CopyWatch()
    try:
        for batch in batches:
            ids, mask, labels = unpack(batch)
            set_window(model, ids.shape[1], 0)  # nothing leaves it: the base model's own full attention
            for row in range(len(ids)):
                real = torch.ones_like(ids[row]) if mask is None else mask[row]
                watch.asked += _asked(row, ids[row], real.bool(), labels[row], window, sinks)
            with observed(model, watch, first=True):
                decoder_of(attached(model))(**model_inputs(model, ids, mask, 0), use_cache=False)
            watch.asked.clear()
    finally:
        set_window(model, window, sinks)
    if not watch.sums:
        raise AHNError(f"No reply says again what stands {window} tokens or more before it: give other, longer texts.")
    return {
        (layer, head): share / watch.counts[layer]
        for layer, found in watch.sums.items()
        for head, share in enumerate(found.tolist())
    }


def most_copying(found: dict[tuple[int, int], float], count: int) -> tuple[tuple[int, int], ...]:
    """So many heads of `copied`, those with the highest shares, as `AHNConfig.slot_heads` takes them.

    Raises:
        AHNError: there are fewer.
    """
    if not 0 < count <= len(found):
        raise AHNError(f"This model has {len(found)} key heads with a memory, {count} cannot be chosen.")
    return tuple(sorted(sorted(found, key=lambda head: -found[head])[:count]))


class _Asked(NamedTuple):
    """Queries of a row (Q,), and which tokens of the row each of them is asked for, (Q, L)."""

    row: int
    queries: Tensor
    wanted: Tensor
    real: Tensor


def _asked(row: int, ids: Tensor, real: Tensor, labels: Tensor, window: int, sinks: int) -> list[_Asked]:
    places, no_sink = torch.arange(len(ids), device=ids.device), real & (real.cumsum(0) > sinks)
    found = []
    for first, last in _runs(labels):
        if first < window:  # nothing was said so long before it
            continue
        said = _said_before(ids, first, last, window)
        for some in torch.arange(max(first, 1), last, device=ids.device).split(QUERIES):
            close = (some[:, None] - torch.arange(first, last, device=ids.device)).abs() <= NEAR
            wanted = (close.float() @ said.float() > 0) & (some[:, None] - 1 - places >= window) & no_sink
            asked = wanted.any(1)
            if asked.any():
                found.append(_Asked(row, some[asked] - 1, wanted[asked], real))
    return found


def _runs(labels: Tensor) -> list[tuple[int, int]]:
    """Where replies begin and end among labels (L,)."""
    inside = torch.nn.functional.pad((labels != IGNORED).int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(inside[::2], inside[1::2], strict=True))


def _said_before(ids: Tensor, first: int, last: int, window: int) -> Tensor:
    """(R, L) bool: for each token of the reply ids[first:last] the places of the words that it is part of."""
    count = min(WORDS, last - first)
    words = ids.unfold(0, count, 1)
    same = (words[first : last - count + 1, None] == words).all(-1)
    same &= torch.arange(len(words), device=ids.device) <= first - window
    said = torch.zeros(last - first, len(ids), dtype=torch.bool, device=ids.device)
    for n in range(count):
        for m in range(count):
            said[n : n + len(same), m : m + len(words)] |= same
    return said


class _CopyWatch(Observer):
    """Adds up the shares of all that is `asked` of a batch."""

    def __init__(self) -> None:
        self.asked: list[_Asked] = []
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def attending(self, layer: LayerContext, call: AttentionCall) -> None:
        for one in self.asked:
            found = _shares(call.query[one.row], call.key[one.row], one, call.scaling)
            self.sums[layer.index] = self.sums.get(layer.index, 0) + found.sum(1).cpu()
            self.counts[layer.index] = self.counts.get(layer.index, 0) + len(one.queries)


def _shares(query: Tensor, key: Tensor, asked: _Asked, scaling: float) -> Tensor:
    """(Hkv, Q): of query (Hq, L, P) and key (Hkv, L, P) the attention to what is wanted."""
    heads, last = len(key), int(asked.queries[-1]) + 1
    at, real, wanted = (x.to(key.device) for x in (asked.queries, asked.real[:last], asked.wanted[:, :last]))
    q = query[:, at].float().unflatten(0, (heads, -1))
    scores = q @ key[:, None, :last].float().mT * scaling
    hidden = (torch.arange(last, device=key.device) > at[:, None]) | ~real
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).mul(wanted).sum(-1).amax(1)

"""Which key heads find what was said long ago: few of a model do, and they alone need to keep tokens.

A head that copies an answer from far back gives one far token a large probability just when the answer is due; one
that looks everywhere gives each a little. So heads are ordered by the largest probability that a query of a reply gives
a single token beyond the window, mean over those queries, in the base model's own full attention.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.errors import AHNError
from ahn.model.adapter import set_window
from ahn.model.attached import attached, observed
from ahn.model.context import LayerContext
from ahn.model.observer import Observer
from ahn.model.route import AttentionCall
from ahn.training.distillation import Batch, model_inputs, unpack
from ahn.training.losses import IGNORED

QUERIES = 64
"""At once: their probabilities are written out."""


@torch.no_grad()
def peaks(model: PreTrainedModel, batches: Iterable[Batch], window: int, sinks: int) -> dict[tuple[int, int], float]:
    """How much of its attention each key head gives the far token that it looks at most, 0 to 1.

    Args:
        model: with a memory attached, of any kind. It keeps the given window afterwards.
        batches: as for `distillation_loss`; the queries are those that predict a token with a label.
        window, sinks: W and S: a token is far at a distance of W or more, and if it is no sink.

    Returns:
        By (layer, key head), of the layers with a memory.

    Raises:
        AHNError: no query has a far token.
    """
    watch = _PeakWatch(window, sinks)
    try:
        for batch in batches:
            ids, mask, labels = unpack(batch)
            set_window(model, ids.shape[1], 0)  # nothing leaves it: the base model's own full attention
            inputs = model_inputs(model, ids, mask, 0)
            for row, wanted in enumerate(labels != IGNORED):
                first = int(inputs["attention_mask"][row].argmax()) if "attention_mask" in inputs else 0
                queries = wanted.nonzero()[:, 0] - 1
                far = queries[queries >= first + sinks + window]
                watch.rows += [(row, first, some) for some in far.split(QUERIES) if len(some)]
            with observed(model, watch, first=True):
                attached(model).get_decoder()(**inputs, use_cache=False)
            watch.rows.clear()
    finally:
        set_window(model, window, sinks)
    if not watch.counts:
        raise AHNError(
            f"No reply comes {window + sinks} tokens or more after what it could look at: give longer texts."
        )
    return {
        (layer, head): peak / watch.counts[layer]
        for layer, found in watch.sums.items()
        for head, peak in enumerate(found.tolist())
    }


def most_peaked(found: dict[tuple[int, int], float], count: int) -> tuple[tuple[int, int], ...]:
    """So many heads of `peaks`, those with the highest, as `AHNConfig.slot_heads` takes them.

    Raises:
        AHNError: there are fewer.
    """
    if not 0 < count <= len(found):
        raise AHNError(f"This model has {len(found)} key heads with a memory, {count} cannot be chosen.")
    return tuple(sorted(sorted(found, key=lambda head: -found[head])[:count]))


class _PeakWatch(Observer):
    """Adds up peaks of the queries of `rows`: a row of the batch, its first real token, some of its queries."""

    def __init__(self, window: int, sinks: int) -> None:
        self.window, self.sinks = window, sinks
        self.rows: list[tuple[int, int, Tensor]] = []
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def attending(self, layer: LayerContext, call: AttentionCall) -> None:
        for row, first, queries in self.rows:
            found = _peaks(call.query[row], call.key[row], queries, first, self.window, self.sinks, call.scaling)
            self.sums[layer.index] = self.sums.get(layer.index, 0) + found.sum(1).cpu()
            self.counts[layer.index] = self.counts.get(layer.index, 0) + len(queries)


def _peaks(query: Tensor, key: Tensor, places: Tensor, first: int, window: int, sinks: int, scaling: float) -> Tensor:
    """(Hkv, Q): of query (Hq, L, P) at these places and key (Hkv, L, P) the largest probability of a far key."""
    heads, last = len(key), int(places[-1]) + 1
    at = places.to(key.device)
    q = query[:, at].float().unflatten(0, (heads, -1))
    scores = q @ key[:, None, first:last].float().mT * scaling
    distance = at[:, None] - torch.arange(first, last, device=key.device)
    shares = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
    far = distance >= window
    far[:, :sinks] = False
    return shares.mul(far).amax(-1).amax(1)

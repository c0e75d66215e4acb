"""Which tokens later queries look at: what a memory of tokens learns, from the base model's own full attention.

Shapes: B batch, L tokens, Hq query heads, Hkv key heads, P head dim. Queries beyond the window look at a token as much
as the largest probability that any of them gives it. For every token and key head the target is in how many of `SHARES`
it is, over their number: the shares of all tokens that are looked at most. So scores learn an order, and any number of
the best can be kept. Nothing of size L × L exists for all heads and queries at once.

Where one layer's score is for all heads (`AHNConfig.score_layer`), it learns where heads look that find what was said
long ago, *teachers* (`ahn.training.heads`), of whichever layers: what they look at is what must not be forgotten.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ahn.cache.layer_context import LayerContext
from ahn.errors import AHNError
from ahn.memory.retained_tokens import RetainedTokens
from ahn.model.adapter import set_window
from ahn.model.attached import observed
from ahn.model.observer import Observer
from ahn.model.route import AttentionCall, own_scores
from ahn.training.distillation import Batch, model_inputs, unpack
from ahn.training.losses import ATTENTION, IGNORED, nothing_counts, to_device
from ahn.wrappers import decoder_of

SHARES = (0.12, 0.04, 0.013)
Teachers: TypeAlias = tuple[tuple[int, int], ...]
"""Heads as `AHNConfig.slot_heads` has them: (layer, key head)."""
NUMBERS = 1 << 26
"""So many probabilities exist at once, each of 4 bytes."""


class Looks(NamedTuple):
    """Losses of one batch, float32 scalars on the model's device; only `loss` carries a gradient.

    With a `count` given to `looks_loss` they are this batch's share of the losses of a larger one.
    """

    loss: Tensor
    """Binary cross entropy of the scores, nats per token and key head, mean over layers; with teachers over these."""
    recall: Tensor
    """Of the first of `SHARES`, the part that as many of the highest scores find; that share is chance."""
    valid: int
    """Number of tokens of this batch that count."""


def looks_loss(
    model: PreTrainedModel,
    batch: Batch,
    window: int,
    sinks: int,
    count: int | None = None,
    start: int = 0,
    teachers: Teachers = (),
) -> Looks:
    """What the scorers of `RetainedTokens` know of where this batch's queries look.

    Args:
        model: with that memory attached. It keeps the given window afterwards.
        batch: as for `distillation_loss`; a row without a label to be learned does not count.
        window, sinks: W and S: tokens among the sinks, and those that no query beyond the window sees, do not count.
        count: tokens that count in all parts of a larger batch, of which this one may have none.
        teachers: (layer, key head) of which a score for all heads learns; `AHNConfig.score_layer` needs some.
    """
    ids, mask, labels = unpack(batch)
    counted = counted_tokens(labels, mask, window, sinks)
    valid = int(counted.sum())
    if not (count or valid):
        raise nothing_counts(window + sinks, ids.shape[1])
    inputs = model_inputs(model, ids, mask, start)
    watch = Watch(model, window, inputs.get("attention_mask"), teachers)
    set_window(model, ids.shape[1], 0)  # nothing leaves it: the base model's own full attention
    try:
        with torch.no_grad(), observed(model, watch, first=True):
            decoder_of(model)(**inputs, use_cache=False)
    finally:
        set_window(model, window, sinks)
    device = inputs["input_ids"].device
    counted = to_device(counted, device)
    # Here and not while the model runs: activation checkpointing would run it again for the scores' gradient.
    losses = [_of_layer(*seen, counted.to(seen[2].device)) for seen in watch.lessons()]
    loss, recall = torch.stack([torch.stack([x.to(device) for x in pair]) for pair in losses]).mean(0).unbind()
    return Looks(loss / (count or valid), recall.detach() / (count or valid), valid)


def counted_tokens(labels: Tensor, mask: Tensor | None, window: int, sinks: int) -> Tensor:
    """(B, L) bool: beyond the sinks, and seen by a query of its row that is at least `window` later."""
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    position = real.cumsum(1) - 1
    beyond = (position >= sinks) & (position + window < real.sum(1, keepdim=True))
    return real & beyond & (labels != IGNORED).any(1, keepdim=True)


class Watch(Observer):
    """Keeps what scorers are to learn from a forward of the base model's own full attention."""

    def __init__(self, model: PreTrainedModel, window: int, mask: Tensor | None, teachers: Teachers = ()) -> None:
        first = model.ahn_config.score_layer
        if bool(teachers) != (first is not None):
            raise AHNError(
                f"Layer {first} scores for all heads, and learns from teachers: name the heads (ahn.training.heads)."
                if first is not None
                else "Every head learns its own scores here; teachers are for AHNConfig.score_layer."
            )
        self.window, self.mask, self.teachers = window, mask, teachers
        self._scored: list[tuple[RetainedTokens, Tensor]] = []
        self._looked: list[Tensor] = []

    def attending(self, layer: LayerContext, call: AttentionCall) -> None:
        memory = layer.ahn.fn
        if not isinstance(memory, RetainedTokens):
            raise AHNError(f"The loss {ATTENTION} teaches scores to RetainedTokens; this model's memory has none.")
        if own_scores(call.kwargs):
            raise AHNError(f"{type(call.module).__name__} has learned sinks or a soft cap, unknown to this loss.")
        heads: Sequence[int] = memory.slot_heads
        if self.teachers:
            heads = [head for at, head in self.teachers if at == layer.index]
        if memory.scorer is not None:
            self._scored.append((memory, layer.x))
        if heads:
            query, key = call.query, call.key
            if len(heads) < key.shape[1]:
                chosen = torch.tensor(heads, device=key.device)
                query = query.unflatten(1, (key.shape[1], -1)).index_select(1, chosen).flatten(1, 2)
                key = key.index_select(1, chosen)
            self._looked.append(most_looked(query, key, call.scaling, self.window, self.mask))

    def lessons(self) -> list[tuple[RetainedTokens, Tensor, Tensor]]:
        """Of each memory with a scorer: the memory, its input (B, L, D), and how much heads look, (B, heads, L)."""
        looked = self._looked
        if self.teachers:
            device = self._scored[0][1].device
            looked = [torch.cat([x.to(device) for x in looked], dim=1)]
        return [(memory, x, some) for (memory, x), some in zip(self._scored, looked, strict=True)]


def most_looked(query: Tensor, key: Tensor, scaling: float, window: int, mask: Tensor | None = None) -> Tensor:
    """The largest probability that a query at least `window` later gives each token, in full attention.

    Args:
        query: (B, Hq, L, P); key: (B, Hkv, L, P), both after RoPE.
        mask: (B, L), 0 for padding.

    Returns:
        (B, Hkv, L) float32: the maximum over those queries, and over the query heads of a key head; 0 for no query.
    """
    B, heads, L, _ = key.shape
    found = torch.zeros(B, heads, L, device=key.device)
    rows = max(1, NUMBERS // (B * query.shape[1] * L))
    real = None if mask is None else mask.to(key.device).bool()
    for first in range(window, L, rows):
        queries = torch.arange(first, min(first + rows, L), device=key.device)
        last = first + len(queries)
        part = query[:, :, first:last].float().unflatten(1, (heads, -1))
        scores = part @ key[:, :, None, :last].float().mT * scaling
        distance = queries[:, None] - torch.arange(last, device=key.device)
        hidden = distance < 0 if real is None else (distance < 0) | ~real[:, None, None, None, :last]
        shares = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        far = distance >= window if real is None else (distance >= window) & real[:, None, None, first:last, None]
        best = shares.mul_(far).amax((2, 3))
        found[:, :, :last] = found[:, :, :last].maximum(best)
    return found


def _of_layer(memory: RetainedTokens, x: Tensor, looked: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens that count: the cross entropy and the recall of each token's row, means over key heads."""
    counted = counted[:, None].expand_as(looked)
    logits = memory.logits(x).expand_as(looked)
    target = highest(looked, counted, SHARES[0])
    found = highest(logits.detach(), counted, SHARES[0])
    error = F.binary_cross_entropy_with_logits(logits, grades(looked, counted) / len(SHARES), reduction="none")
    hits = (found & target).sum(2) / target.sum(2).clamp_min(1)
    heads = looked.shape[1]
    return error[counted].sum() / heads, (hits * counted.sum(2)).sum() / heads


def grades(looked: Tensor, counted: Tensor) -> Tensor:
    """(B, Hkv, L) uint8: in how many of `SHARES` each token is."""
    return torch.stack([highest(looked, counted, share) for share in SHARES]).sum(0, dtype=torch.uint8)


def highest(x: Tensor, counted: Tensor, share: float) -> Tensor:
    """(B, Hkv, L) bool: this share of the tokens that count, those with the highest x, per row and key head."""
    order = x.masked_fill(~counted, float("-inf")).argsort(dim=2, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(2, order, torch.arange(x.shape[2], device=x.device).expand_as(order))
    return counted & (rank < (share * counted.sum(2, keepdim=True)).ceil())

"""In which basis the keys of quantized tokens are coded: from texts that the base model reads once, without gradients.

`ahn.ops.basis` says what is wanted: M, second moments of the queries as a coded key meets them (before RoPE, turned to
the distance at which the tier shows it), and C, those of the keys (before RoPE, less the mean of the first window).
Each is the sum of two, of equal traces. In one all queries and keys count alike. In the other they count by the
attention that queries give to keys of the tier: few keys get most of it, and they are not like the others.

Shapes: L tokens, Hq query heads, Hkv key heads, G query heads of each, P head dim, n queries, N distances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.cache.layer_context import LayerContext
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.layout.rotation import Rotation
from ahn.memory.key_basis import KeyBasis
from ahn.model.adapter import set_window
from ahn.model.attached import attached, observed
from ahn.model.observer import Observer
from ahn.model.route import AttentionCall, own_scores
from ahn.training.distillation import Batch, model_inputs, unpack
from ahn.wrappers import decoder_of

QUERIES = 256
"""Of a text, evenly spaced."""
DISTANCES = 48
"""To which queries are turned, evenly spaced by their logarithm."""
FLOOR = 1e-3
"""Of the mean variance: added to M in every direction, which keeps its inverse from amplifying what rounding leaves."""
LEAST = 1e-8
"""Of the largest: variances in the basis are taken to be no less."""


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Batch]) -> int:
    """Fill the bases of all layers; `ahn.save_adapter` then writes them.

    Args:
        model: with `AHNConfig.calibrated_keys` attached, whose sinks, window and `tier_reach` count.
        batches: as for `distillation_loss`; each row is a text. Of padding nothing is read.

    Returns:
        The tokens of all texts.

    Raises:
        AHNError: the model's keys are not coded so, or no text is longer than sinks and two windows.
    """
    inner = attached(model)
    config: AHNConfig = inner.ahn_config
    if not (config.calibrated_keys and config.quantized):
        raise AHNError(
            "This model's keys have no basis to calibrate: attach an AHNConfig with calibrated_keys=True and quantized "
            "tokens."
        )
    watch, count = _Watch(config, inner._ahn.rotation), 0
    try:
        for batch in batches:
            ids, mask, _ = unpack(batch)
            for row, text in enumerate(ids):
                own = text if mask is None else text[mask[row].bool()]
                if len(own) <= config.sinks + 2 * config.window:
                    continue
                count += len(own)
                set_window(model, len(own), 0)  # nothing leaves it: the base model's own full attention
                with observed(model, watch, first=True):
                    decoder_of(inner)(**model_inputs(model, own[None], None, 0), use_cache=False)
    finally:
        set_window(model, config.window, config.sinks)
    if not count:
        raise AHNError(f"No text has more than {config.sinks + 2 * config.window} tokens: give longer ones.")
    for basis, moments in watch.found.values():
        weight, deviations = moments.basis()
        basis.weight.copy_(weight)
        basis.deviations.copy_(deviations)
    return count


@dataclasses.dataclass
class Moments:
    """Sums over texts, float64 (Hkv, P, P): of queries and of keys, all alike and by attention."""

    queries: Tensor
    attending: Tensor
    keys: Tensor
    attended: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, x.name) + getattr(other, x.name) for x in dataclasses.fields(self)))

    def basis(self) -> tuple[Tensor, Tensor]:
        """The weight (Hkv, P, P) and the deviations (Hkv, P) of a `KeyBasis`, the largest deviation 1."""
        metric = _alike(self.queries, self.attending)
        metric = metric + FLOOR * torch.eye(metric.shape[-1], dtype=metric.dtype)
        values, vectors = torch.linalg.eigh(metric)
        root = vectors @ torch.diag_embed(values.clamp_min(0).sqrt()) @ vectors.mT
        variances, directions = torch.linalg.eigh(root @ _alike(self.keys, self.attended) @ root)
        deviations = variances.flip(-1).clamp_min(LEAST * variances[:, -1:]).sqrt()
        first = deviations[:, :1]
        return directions.flip(-1).mT @ root / first[..., None], deviations / first


def _alike(x: Tensor, y: Tensor) -> Tensor:
    """The sum of two matrices (Hkv, P, P), each with a mean of 1 on its diagonal; the first alone if the other is 0."""
    means = (one.diagonal(dim1=-1, dim2=-2).mean(-1)[:, None, None] for one in (x, y))
    return sum((one / mean.clamp_min(1e-30) for one, mean in zip((x, y), means, strict=True)), torch.zeros_like(x))


class _Watch(Observer):
    """Adds up the moments of a layer's queries and keys, one text at a time."""

    def __init__(self, config: AHNConfig, rotation: Rotation | None) -> None:
        self.config, self.rotation = config, rotation
        self.found: dict[int, tuple[KeyBasis, Moments]] = {}

    def attending(self, layer: LayerContext, call: AttentionCall) -> None:
        if own_scores(call.kwargs):
            raise AHNError(f"{type(call.module).__name__} has learned sinks or a soft cap, unknown to calibration.")
        basis = layer.ahn.fn.key_basis
        assert basis is not None
        rotation = self.rotation if layer.rotates else None
        first, L = self.config.lossless, call.key.shape[2]
        at = torch.linspace(first, L - 1, min(QUERIES, L - first), device=call.key.device).long()
        new = moments(call.query[:, :, at], call.key, at, call.scaling, self.config, rotation)
        before = self.found.get(layer.index)
        self.found[layer.index] = basis, new if before is None else before[1] + new


def moments(
    query: Tensor, key: Tensor, at: Tensor, scaling: float, config: AHNConfig, rotation: Rotation | None
) -> Moments:
    """Of one text in full attention.

    Args:
        query: (1, Hq, n, P); key: (1, Hkv, L, P), both after RoPE.
        at: (n,) positions of the queries.
        config: says which tokens are exact, and from how far others are seen.
        rotation: of the keys; None where there is none.
    """
    S, W, L, device = config.sinks, config.window, key.shape[2], key.device
    positions = torch.arange(L, device=device)
    query, key = query.float(), key.float()
    scores = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].mT * scaling
    distance = at[:, None] - positions
    scores = scores[0].masked_fill_(distance < 0, float("-inf"))
    shares = scores.softmax(-1) * ((distance >= W) & (positions >= S))
    farthest = config.tier_reach or L - 1
    grid = torch.logspace(0, 1, DISTANCES, base=max(farthest / W, 1 + 1e-6), device=device) * W
    if rotation is not None:
        query, key = rotation.undo(query, at[None]), rotation.undo(key, positions[None])
    q = query[0].unflatten(0, (key.shape[1], -1)).flatten(1, 2)
    k = key[0] - key[0, :, S : S + W].mean(1, keepdim=True)
    left = k[:, S : L - W]
    by_key = shares.sum((1, 2))
    nearest = torch.bucketize(distance.clamp(W, farthest).float(), (grid[1:] * grid[:-1]).sqrt())
    by_distance = shares.new_zeros(*shares.shape[:3], DISTANCES)
    by_distance.scatter_add_(-1, nearest.expand_as(shares), shares)
    weighed = by_distance.flatten(1, 2).mT[..., None] * q[:, None]
    inner = weighed.mT @ q[:, None]  # (Hkv, N, P, P)
    every = (q.mT @ q)[:, None].expand_as(inner) / DISTANCES
    turns = _turns(rotation, grid.round().long(), key)
    parts = ((turns.mT @ x @ turns).sum(1) for x in (every, inner))
    found = (*parts, left.mT @ left, (k * by_key[..., None]).mT @ k)
    return Moments(*(x.double().cpu() for x in found))


def _turns(rotation: Rotation | None, distances: Tensor, like: Tensor) -> Tensor:
    """(N, P, P): a vector (P,) from before RoPE times the n-th is what it is at the n-th distance."""
    each = torch.eye(like.shape[-1], device=like.device).expand(len(distances), 1, -1, -1)
    if rotation is None:
        return each[:, 0]
    return rotation.turn(each, distances[:, None].expand(-1, each.shape[-1]))[:, 0]

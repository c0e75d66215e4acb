"""The part that the tier has in a step where its keys are coded in a calibrated basis (`ahn.ops.basis`).

The first kernel of `ahn.ops.step.tier_kernel` does what has nothing to do with a basis: it rotates queries, puts the
value that leaves the window into the tier, and takes its mean from the key. The rest is here, in torch operations that
a GPU runs compiled: no size in them depends on what a step holds, so they are the same kernels in every step.

A far token's key is not decoded: all that are seen at one distance meet the same query, which is brought into the
basis instead. A near one's is, for it is turned by its own angle. Products over tokens are written as sums: so codes
are looked up where they are summed, and the numbers that they mean are never written down.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ahn.layout.state import TierRing, TierState
from ahn.ops.basis import Basis
from ahn.ops.quantize import decode_rotated, rotate
from ahn.ops.step.turn import TierTurn, turned

PART, MOST_PARTS = 128, 64  # tokens of a part, unless there are too many


@dataclasses.dataclass
class KeyStep:
    """What `push_and_attend` is told by the kernel before it, and what it tells those after it.

    Attributes:
        key: (B, Hkv, P) float32, the key that leaves the window as it is coded, less its mean.
        query: (B, Hq, P) float32, rotated as it meets tokens that are farthest; before RoPE where those are turned.
        before: (B, Hq, P) float32, the query before RoPE; None where no key is turned.
        gone: (B, Hkv, P), where the key that leaves the tier is written.
        out, score: (B, Hq, N, P) and (B, Hq, N) float32, where the sum of the values and the logarithm of the weights
            of each of N parts of the tier are written.
    """

    key: Tensor
    query: Tensor
    before: Tensor | None
    gone: Tensor
    out: Tensor
    score: Tensor


def push_and_attend(
    step: KeyStep,
    positions: Tensor,
    active: Tensor,
    tier: TierState,
    basis: Basis,
    turn: TierTurn | None,
    slots: int,
    scaling: float,
) -> None:
    """Put the key that leaves the window into the tier, whose value is there already, and attend to all of the tier.

    Args:
        positions, active, tier, basis, turn, scaling: see `ahn.ops.step.reference.step`.
        slots: T.
    """
    weigh, add = push_and_weigh, add_values
    if step.key.is_cuda:
        weigh, add = compiled(weigh), compiled(add)
    # Two functions, so that weights are written down between them: where values are summed, each is used P times.
    weights = weigh(step, positions, active, tier.keys, basis, turn, slots, scaling)
    add(step, weights, positions, tier.values, slots)


def push_and_weigh(
    step: KeyStep,
    positions: Tensor,
    active: Tensor,
    keys: TierRing,
    basis: Basis,
    turn: TierTurn | None,
    slots: int,
    scaling: float,
) -> Tensor:
    """The part of `push_and_attend` that knows keys: weights (B, Hkv, G, N, tokens of a part) whose sums are 1."""
    newest = positions - slots  # the token that leaves the window, from the first that left
    _push(step, newest, active, keys, basis, turn)
    own, held = _by_age(keys, newest, step.score.shape[2])
    scores = _scores(step, own, basis, turn) * scaling
    scores = scores.masked_fill(~held[:, :, None], float("-inf")).unflatten(-1, (step.score.shape[2], -1))
    highest = scores.amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    step.score.copy_((highest + total.log()).flatten(1, 2)[..., 0])
    return weights / total.masked_fill(total == 0, 1)


def add_values(step: KeyStep, weights: Tensor, positions: Tensor, values: TierRing, slots: int) -> None:
    """The part of `push_and_attend` that knows values."""
    parts = weights.shape[3]
    own, _ = _by_age(values, positions - slots, parts)
    levels = decode_rotated(own.codes, own.scales, weights.dtype, own.bits).unflatten(2, (parts, -1))
    found = [(weights[:, :, group, :, :, None] * levels).sum(3) for group in range(weights.shape[2])]
    out = rotate(torch.stack(found, 2)) + own.offset[:, :, None, None]  # (B, Hkv, G, N, P)
    step.out.copy_(out.flatten(1, 2))


def _push(step: KeyStep, newest: Tensor, active: Tensor, keys: TierRing, basis: Basis, turn: TierTurn | None) -> None:
    rows, slot = torch.arange(len(newest), device=newest.device), newest % keys.codes.shape[2]
    old, old_scale = keys.codes[rows, :, slot], keys.scales[rows, :, slot]
    gone = basis.decode(old[:, :, None], old_scale[:, :, None], step.key.dtype)[:, :, 0] + keys.offset
    step.gone.copy_(gone if turn is None else turned(gone, *turn.token[:, 2, :, None].unbind(1)))
    code, scale = (x[:, :, 0] for x in basis.encode(step.key[:, :, None]))
    leaves = (active & (newest >= 0))[:, None]
    keys.codes[rows, :, slot] = torch.where(leaves[..., None], code, old)
    keys.scales[rows, :, slot] = torch.where(leaves, scale.to(old_scale.dtype), old_scale)


def _by_age(ring: TierRing, newest: Tensor, parts: int) -> tuple[TierRing, Tensor]:
    """Codes and scales of tokens by age, as many in each part, and which (B, 1, C) are there.

    What no token has taken yet may be anything: codes then mean some number, and scales are taken for 0.
    """
    _, heads, capacity, size = ring.codes.shape
    ages = torch.arange(parts * -(-capacity // parts), device=newest.device)
    held = ((ages <= newest[:, None]) & (ages < capacity))[:, None]
    at = ((newest[:, None] - ages) % capacity)[:, None]
    codes = ring.codes.gather(2, at[..., None].expand(-1, heads, -1, size))
    scales = ring.scales.gather(2, at.expand(-1, heads, -1))
    return TierRing(codes, torch.where(held, scales, 0), ring.offset), held


def _scores(step: KeyStep, keys: TierRing, basis: Basis, turn: TierTurn | None) -> Tensor:
    """(B, Hkv, G, C) products of queries with keys by age."""
    synthesis, count = basis.synthesis.to(step.query.dtype), 0 if turn is None else turn.count
    heads, offset, parts = keys.offset.shape[1], keys.offset[:, :, None], []
    if turn is not None and step.before is not None and count:
        decoded = basis.decode(keys.codes[:, :, :count], keys.scales[:, :, :count], synthesis.dtype) + offset
        (first, second), (cos, sin) = decoded.chunk(2, -1), turn.near_by_age()
        x, y = step.before.unflatten(1, (heads, -1)).chunk(2, -1)
        parts.append(_products(first * cos + second * sin, x) + _products(second * cos - first * sin, y))
    if count < keys.codes.shape[2]:
        query = step.query.unflatten(1, (heads, -1))
        levels = basis.levels(keys.codes[:, :, count:], keys.scales[:, :, count:], synthesis.dtype)
        shared = (query * offset).sum(-1, keepdim=True)
        parts.append(_products(levels, query @ synthesis.mT) + shared)
    return torch.cat(parts, -1)


def _products(x: Tensor, queries: Tensor) -> Tensor:
    """(B, Hkv, G, T) of x (B, Hkv, T, K) with queries (B, Hkv, G, K), in one pass that works x out once for all."""
    return torch.stack([(x * query[:, :, None]).sum(-1) for query in queries.unbind(2)], 2)


def parts_of(capacity: int) -> int:
    """N for a tier of so many tokens: enough that a single query keeps every multiprocessor busy."""
    return min(MOST_PARTS, -(-capacity // PART))


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a GPU runs it, with levels worked out where they are summed instead of written down."""
    options: dict[str, Any] = {
        "realize_opcount_threshold": 200, "realize_reads_threshold": 16, "realize_acc_reads_threshold": 32,
    }  # fmt: skip
    return torch.compile(function, dynamic=False, options=options)

"""The part that the tier has in a step where its keys are coded in a calibrated basis (`ahn.ops.basis`).

The first kernel of `ahn.ops.step.tier_kernel` does what has nothing to do with a basis: it rotates queries, puts the
value that leaves the window into the tier, and takes its mean from the key. The rest is here, in torch operations that
a GPU runs compiled: no size in them depends on what a step holds, so they are the same kernels in every step.

A far token's key is not decoded: all that are seen at one distance meet the same query, which is brought into the
basis instead. A near one's is, for it is turned by its own angle. Products over tokens are written as sums: so codes
are looked up where they are summed, and the numbers that they mean are never written down.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ahn.layout.state import TierRing, TierState
from ahn.ops.basis import Basis
from ahn.ops.quantize import decode_rotated, rotate
from ahn.ops.step.turn import TierTurn, turned


@dataclasses.dataclass
class KeyStep:
    """What `push_and_attend` is told by the kernel before it, and what it tells those after it.

    Attributes:
        key: (B, Hkv, P) float32, the key that leaves the window as it is coded, less its mean.
        query: (B, Hq, P) float32, rotated as it meets tokens that are farthest; before RoPE where those are turned.
        before: (B, Hq, P) float32, the query before RoPE; None where no key is turned.
        gone: (B, Hkv, P), where the key that leaves the tier is written.
        out, score: (B, Hq, P) and (B, Hq) float32, where the sum of the tier's values and the logarithm of its weights
            are written.
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
    newest = positions - slots  # the token that leaves the window, from the first that left
    _push(step, newest, active, tier.keys, basis, turn)
    capacity = tier.keys.codes.shape[2]
    ages = torch.arange(capacity, device=newest.device)
    held = (ages <= newest[:, None])[:, None]
    at = ((newest[:, None] - ages) % capacity)[:, None]
    # What no token has taken yet may be anything: codes then mean some number, and scales are not looked at.
    keys, values = (_by_age(ring, at, held) for ring in (tier.keys, tier.values))
    scores = _scores(step, keys, basis, turn) * scaling
    scores = scores.masked_fill(~held[:, :, None], float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    weights = (scores - total.masked_fill(total == float("-inf"), 0)).exp()  # (B, Hkv, G, C)
    levels = decode_rotated(values.codes, values.scales, weights.dtype, values.bits)
    out = rotate((weights[..., None] * levels[:, :, None]).sum(3)) + values.offset[:, :, None]
    step.out.copy_(out.flatten(1, 2))
    step.score.copy_(total.flatten(1))


def _push(step: KeyStep, newest: Tensor, active: Tensor, keys: TierRing, basis: Basis, turn: TierTurn | None) -> None:
    rows, slot = torch.arange(len(newest), device=newest.device), newest % keys.codes.shape[2]
    old, old_scale = keys.codes[rows, :, slot], keys.scales[rows, :, slot]
    gone = basis.decode(old[:, :, None], old_scale[:, :, None], step.key.dtype)[:, :, 0] + keys.offset
    step.gone.copy_(gone if turn is None else turned(gone, *turn.token[:, 2, :, None].unbind(1)))
    code, scale = (x[:, :, 0] for x in basis.encode(step.key[:, :, None]))
    leaves = (active & (newest >= 0))[:, None]
    keys.codes[rows, :, slot] = torch.where(leaves[..., None], code, old)
    keys.scales[rows, :, slot] = torch.where(leaves, scale.to(old_scale.dtype), old_scale)


def _by_age(ring: TierRing, slots: Tensor, held: Tensor) -> TierRing:
    """Codes and scales in the order of these slots (B, 1, C), 0 for the scales of those that hold nothing."""
    heads, size = ring.codes.shape[1], ring.codes.shape[3]
    codes = ring.codes.gather(2, slots[..., None].expand(-1, heads, -1, size))
    scales = ring.scales.gather(2, slots.expand(-1, heads, -1))
    return TierRing(codes, torch.where(held, scales, 0), ring.offset)


def _scores(step: KeyStep, keys: TierRing, basis: Basis, turn: TierTurn | None) -> Tensor:
    """(B, Hkv, G, C) products of queries with keys by age."""
    synthesis, count = basis.synthesis.to(step.query.dtype), 0 if turn is None else turn.count
    levels = basis.levels(keys.codes, keys.scales, synthesis.dtype)
    query, offset = step.query.unflatten(1, (keys.offset.shape[1], -1)), keys.offset[:, :, None]
    parts = []
    if turn is not None and step.before is not None and count:
        decoded = levels[:, :, :count] @ synthesis + offset
        first, second = (x[:, :, None] for x in decoded.chunk(2, -1))
        x, y = step.before.unflatten(1, (keys.offset.shape[1], -1))[:, :, :, None].chunk(2, -1)
        cos, sin = turn.near_by_age()
        parts.append((first * (x * cos - y * sin) + second * (y * cos + x * sin)).sum(-1))
    if count < levels.shape[2]:
        within = query @ synthesis.mT  # (B, Hkv, G, K)
        shared = (query * offset).sum(-1, keepdim=True)
        parts.append((levels[:, :, None, count:] * within[:, :, :, None]).sum(-1) + shared)
    return torch.cat(parts, -1)


@cache
def compiled() -> Any:
    """`push_and_attend` as a GPU runs it."""
    return torch.compile(push_and_attend, dynamic=False)

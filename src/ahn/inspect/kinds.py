"""Means by kind of token, with intervals that know that neighbouring tokens are alike."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ahn.errors import AHNError

BLOCK = 64
"""Consecutive tokens that count as one draw."""
Z = 1.96


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean and its 95 % interval (nan where there is a single block of text)."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class KindWrites:
    """How the tokens of one kind were written, averaged over heads.

    Attributes:
        tokens: how many.
        strength: of the write gate.
        update: ‖k̂ uᵀ‖ as a multiple of the same head's mean over all tokens: above 1 is more than its share.
        decay: factor on the state just before.
    """

    kind: str
    tokens: int
    strength: Mean
    update: Mean
    decay: Mean


def summarise(
    kinds: Sequence[str], positions: Tensor, strength: Tensor, decay: Tensor, update: Tensor
) -> list[KindWrites]:
    """Largest update first.

    Args:
        kinds: by position.
        positions: (N,) of the written tokens.
        strength, decay, update: (heads, N).

    Raises:
        AHNError: a written token has no kind.
    """
    if len(positions) and int(positions.max()) >= len(kinds):
        raise AHNError(f"The token at position {int(positions.max())} was written, but only {len(kinds)} have a kind.")
    relative = update / update.mean(-1, keepdim=True).clamp_min(1e-12)
    of = [kinds[position] for position in positions.tolist()]
    found = []
    for kind in sorted(set(of)):
        here = torch.tensor([name == kind for name in of])
        means = [_mean(x.double().mean(0)[here], positions[here]) for x in (strength, relative, decay)]
        found.append(KindWrites(kind, int(here.sum()), *means))
    return sorted(found, key=lambda entry: -entry.update.value)


def _mean(x: Tensor, positions: Tensor) -> Mean:
    """Of x (N,), with the variance of a ratio over blocks of text."""
    mean = float(x.mean())
    _, block = torch.unique(positions // BLOCK, return_inverse=True)
    blocks = int(block.max()) + 1
    if blocks == 1:
        return Mean(mean, math.nan, math.nan)
    deviations = torch.zeros(blocks, dtype=x.dtype).index_add_(0, block, x - mean)
    half = Z * math.sqrt(float(deviations.square().sum()) * blocks / (blocks - 1)) / len(x)
    return Mean(mean, mean - half, mean + half)

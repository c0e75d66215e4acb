"""The tokens that leave the window in one forward, on their way into the memory."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ahn.layout.visibility import Visibility


@dataclasses.dataclass
class Evicted:
    """The m tokens that leave the window in one forward: key, value (B, Hkv, m, P), gates (B, Hq, m, ...)."""

    key: Tensor
    value: Tensor
    gates: dict[str, Tensor]


def without_padding(left: Evicted, closed: Mapping[str, float], view: Visibility) -> Evicted:
    """Evicted tokens that cannot harm a state: closed gates keep padding out, zeros keep its NaN from being 0 · NaN.

    Args:
        closed: for each gate the value at which a token leaves the state untouched (`Memory.closed_gates`).
    """
    if view.writable is None or not view.evicted:
        return left
    kept = view.writable[:, None, :]
    gates = {}
    for name, gate in left.gates.items():
        fits = kept.reshape(kept.shape + (1,) * (gate.dim() - 3))
        gates[name] = torch.where(fits, gate, closed[name])
    padding = ~kept[..., None]
    return Evicted(left.key.masked_fill(padding, 0), left.value.masked_fill(padding, 0), gates)

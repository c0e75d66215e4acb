"""Gated DeltaNet whose keys go through a learned feature map first: a state with more, and better separated, places.

The base model's attention weighs a key by exp(q·k); a linear state by q·k, in which every stored key answers a little
to every query. A softmax over learned directions makes features of which few are large (Hedgehog, arXiv 2402.04347), so
keys disturb each other less, and there are twice as many features as head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahn import ops
from ahn.memory.base import HeadLinear, l2_norm
from ahn.memory.gated_deltanet import GatedDeltaNet

EXPANSION = 2


class FeatureDeltaNet(GatedDeltaNet):
    """`φ(k) = softmax([W k, -W k])` for keys, with its own W for queries; then as Gated DeltaNet."""

    name = "feature_deltanet"
    published_name = "FeatureDeltaNet"

    def build(self) -> None:
        super().build()
        self.k_map = HeadLinear(self.heads, self.head_dim)
        self.q_map = HeadLinear(self.heads, self.head_dim)

    def reset_gates(self) -> None:
        super().reset_gates()
        for feature_map in (self.k_map, self.q_map):
            feature_map.weight.copy_(torch.eye(self.head_dim).expand_as(feature_map.weight))

    def init_state(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """(B, H, 2 P, P) float32 zeros."""
        return {"state": torch.zeros(batch, self.heads, EXPANSION * self.head_dim, self.head_dim, device=device)}

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q_hat, k_hat = features(self.q_map, q) * self.head_dim**-0.5, features(self.k_map, k)
        o, new = ops.delta_rule(q_hat, k_hat, v, gates["beta"], gates["decay"], state["state"])
        return o, {"state": new}

    def step_rule(self) -> None:
        return None  # the kernels know square states only


def features(feature_map: nn.Module, x: Tensor) -> Tensor:
    """x (B, H, m, P) to (B, H, m, 2 P), float32, of unit length."""
    y = feature_map(x).float()
    return l2_norm(torch.cat([y, -y], dim=-1).softmax(-1))

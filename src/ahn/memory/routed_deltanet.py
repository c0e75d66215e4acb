"""Routed DeltaNet: several delta-rule states per key head, among which keys and queries choose by their direction."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ahn import ops
from ahn.memory.base import HeadLinear, l2_norm
from ahn.memory.deltanet import DeltaNet
from ahn.ops.routes import Routes, joined, repeated


class RoutedDeltaNet(DeltaNet):
    """`S_r ← S_r + k̂' (β s_r(k') (v - S_rᵀ k̂'))ᵀ`, read `Σ_r s_r(q') S_rᵀ q̂' / √P` (`ahn.ops.routes`).

    Not in the AHN paper. A delta rule holds as many associations as a key has directions; R states hold R times as
    many if like keys go to like states. Choosing among states is known from Mixture-of-Memories (Du et al. 2025, arXiv
    2502.13685), there by the token's hidden state, the highest few. Query heads that share a key head would write the
    same keys and values into states of their own; here they share its states. `docs/results.md` has what it is worth.

    Maps see keys and queries as they are rotated: what is read depends on positions, not on distances alone. A padded
    row is the row alone if its tokens have the same `position_ids`, as `generate` gives them.
    """

    name = "routed_deltanet"
    published_name = "RoutedDeltaNet"
    states: ClassVar[int] = 8
    sees_positions: ClassVar[bool] = True

    @property
    def write_heads(self) -> int:
        return self.kv_heads

    def build(self) -> None:
        super().build()
        both = self.heads, self.kv_heads
        self.q_map, self.k_map = (HeadLinear(heads, self.head_dim) for heads in both)
        self.q_route, self.k_route = (nn.Parameter(torch.empty(heads, self.head_dim, self.states)) for heads in both)

    def reset_gates(self) -> None:
        super().reset_gates()
        for linear in (self.q_map, self.k_map):
            nn.init.zeros_(linear.weight)
        nn.init.normal_(self.k_route)
        self.k_route.div_(self.k_route.norm(dim=1, keepdim=True))
        self.q_route.copy_(self.k_route.repeat_interleave(self.heads // self.kv_heads, dim=0))

    @property
    def routes(self) -> Routes:
        return Routes(self.q_map.weight, self.k_map.weight, self.q_route, self.k_route)

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        k, beta = self.routes.keys(k, gates["beta"])
        q, share = self.routes.queries(q)
        q = repeated(l2_norm(q) * self.head_dim**-0.5, self.kv_heads, self.states)
        k, v = (x.repeat_interleave(self.states, dim=1) for x in (l2_norm(k), v))
        o, new = ops.delta_rule(q, k, v, beta, None, state["state"])
        return joined(o, share, self.kv_heads), {"state": new}

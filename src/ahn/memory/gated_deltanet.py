"""Gated DeltaNet: the delta rule over a state that also decays (Yang et al. 2024, arXiv 2412.06464)."""

import math

import torch
from torch import Tensor, nn

from ahn.memory.base import head_gate
from ahn.memory.deltanet import DeltaNet
from ahn.ops.gate import Gate

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class GatedDeltaNet(DeltaNet):
    """DeltaNet after `S ← exp(g) S`, with `g = -exp(A_log) softplus(a_proj x + dt_bias)` (docs/spec.md, section 3)."""

    name = "gated_deltanet"
    published_name = "GatedDeltaNet"
    closed_gates = {"beta": 0.0, "decay": 0.0}  # noqa: RUF012  (a constant of the class)

    def build(self) -> None:
        super().build()
        self.a_proj = nn.Linear(self.hidden_size, self.heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))  # in published checkpoints, never used

    def reset_gates(self) -> None:
        super().reset_gates()
        # log U(0, 16); a zero draw would be log 0
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(0, 16).clamp_min(1e-4).log())
        step = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        step = step.clamp_min(DT_FLOOR)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        nn.init.ones_(self.D)

    @torch.no_grad()
    def start_with_horizons(self, horizons: Tensor) -> None:
        self.A_log.zero_()
        step = 1 / horizons
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def step_gates(self, x: Tensor) -> dict[str, Gate]:
        decay = Gate(head_gate(self.a_proj, x), "softplus", self.dt_bias, self.A_log)
        return super().step_gates(x) | {"decay": decay}

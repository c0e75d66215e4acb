"""Mamba2: a decaying sum of value-key outer products (Dao and Gu 2024, arXiv 2405.21060)."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahn import ops
from ahn.memory.base import RecurrentMemory, head_gate
from ahn.ops.gate import Gate
from ahn.ops.rule import StepRule

NORM_EPS = 1e-5  # of the RMSNorm of a read


class Mamba2(RecurrentMemory):
    """`S ← exp(-exp(A_log) dt) S + k̂ (dt v)ᵀ`, read `Sᵀ q̂` (docs/spec.md, section 3).

    The published implementation keeps the transpose of this state.
    """

    name = "mamba2"
    published_name = "Mamba2"
    heads_apart = True
    closed_gates = {"step": 0.0, "decay": 0.0}  # noqa: RUF012  (a constant of the class)

    def build(self) -> None:
        self.dt_proj = nn.Linear(self.hidden_size, self.heads)
        self.g_proj = nn.Linear(self.hidden_size, self.heads)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.norm = nn.RMSNorm(self.heads * self.head_dim, eps=NORM_EPS)

    def reset_gates(self) -> None:
        nn.init.ones_(self.dt_bias)
        self.A_log.copy_(torch.arange(1, self.heads + 1, dtype=self.A_log.dtype, device=self.A_log.device).log())
        nn.init.ones_(self.norm.weight)

    @torch.no_grad()
    def start_with_horizons(self, horizons: Tensor) -> None:
        self.A_log.copy_(-(horizons * F.softplus(self.dt_bias)).log())

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        return {name: gate.value() for name, gate in self.step_gates(x).items()}

    def step_gates(self, x: Tensor) -> dict[str, Gate]:
        step = Gate(head_gate(self.dt_proj, x), "softplus", self.dt_bias)
        return {"step": step, "decay": dataclasses.replace(step, log_rate=self.A_log)}

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q_hat, k_hat = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
        v = v.float() * gates["step"].unsqueeze(-1)
        o, new = ops.decay_rule(q_hat, k_hat, v, gates["decay"], state["state"])
        return o, {"state": new}

    def step_rule(self) -> StepRule | None:
        if self.share.parallel:
            return None  # its norm goes over all heads: no kernel waits for other processes
        # F.normalize divides by max(norm, 1e-12).
        return StepRule("step", "decay", False, 1e-24, 1.0, NORM_EPS, across_heads=True)

    @property
    def step_norm(self) -> Tensor:
        return self.norm.weight

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        gamma = self.read_gate(x).float().unsqueeze(-1)
        B, H, N, P = o.shape
        # One norm over all heads together: (B, H, N, P) to (B, N, H·P) and back.
        merged = (o * F.silu(gamma)).transpose(1, 2).reshape(B, N, H * P)
        scale = torch.rsqrt(self.share.mean(merged.square().mean(-1, keepdim=True)) + NORM_EPS)
        merged = merged * scale * self.norm.weight.float()
        return self.o_proj(merged.view(B, N, H, P).transpose(1, 2))

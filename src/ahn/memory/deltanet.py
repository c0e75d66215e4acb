"""DeltaNet: replace what the state predicts for a key by the key's value (Schlag et al. 2021, arXiv 2102.11174)."""

import torch
from torch import Tensor, nn

from ahn import ops
from ahn.memory.base import RecurrentMemory, head_gate, l2_norm, rms_norm
from ahn.ops.gate import Gate
from ahn.ops.rule import StepRule

NORM_EPS = 1e-5  # of the RMSNorm of a read


class DeltaNet(RecurrentMemory):
    """`S ← S + k̂ (β (v - Sᵀ k̂))ᵀ`, read `Sᵀ q̂ / √P` (docs/spec.md, section 3)."""

    name = "deltanet"
    published_name = "DeltaNet"
    heads_apart = True
    closed_gates = {"beta": 0.0}  # noqa: RUF012  (a constant of the class)

    def build(self) -> None:
        self.b_proj = nn.Linear(self.hidden_size, self.write_heads, bias=False)
        self.g_proj = nn.Linear(self.hidden_size, self.heads, bias=False)
        self.o_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS)

    def reset_gates(self) -> None:
        nn.init.ones_(self.o_norm.weight)

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        return {name: gate.value() for name, gate in self.step_gates(x).items()}

    def step_gates(self, x: Tensor) -> dict[str, Gate]:
        return {"beta": Gate(head_gate(self.b_proj, x), "sigmoid")}

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q_hat = l2_norm(q) * self.head_dim**-0.5
        o, new = ops.delta_rule(q_hat, l2_norm(k), v, gates["beta"], gates.get("decay"), state["state"])
        return o, {"state": new}

    def step_rule(self) -> StepRule:
        decay = "decay" if "decay" in self.closed_gates else None
        return StepRule("beta", decay, True, 1e-6, self.head_dim**-0.5, NORM_EPS, across_heads=False)

    @property
    def step_norm(self) -> Tensor:
        return self.o_norm.weight

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        gamma = self.read_gate(x).float().unsqueeze(-1)
        o = rms_norm(o, self.o_norm.weight, NORM_EPS) * gamma * torch.sigmoid(gamma)
        return self.o_proj(o)

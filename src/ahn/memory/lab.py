"""Ideas on trial: larger states, other keys, negative eigenvalues, codes in training."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ahn import ops
from ahn.memory.base import HeadLinear, head_gate, l2_norm
from ahn.memory.deltanet import DeltaNet
from ahn.ops.gate import Gate

R = 4


def run(memory, q, k, v, beta, state):
    """(B, H, m, P) raw read; kernels on a GPU."""
    if q.is_cuda and state.dtype == torch.float32:
        from ahn.ops import scan_gradients

        half = torch.bfloat16
        rule = DeltaNet.step_rule(memory)
        return scan_gradients.Scan.apply(
            q.to(half).contiguous(), k.to(half).contiguous(), v.to(half).contiguous(), beta.float(), None, state, rule
        )
    return ops.delta_rule(l2_norm(q) * q.shape[-1] ** -0.5, l2_norm(k), v, beta, None, state)


class Negative(DeltaNet):
    name = "deltanet_negative"
    published_name = "DeltaNetNegative"

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        return {"beta": 2 * Gate(head_gate(self.b_proj, x), "sigmoid").value()}


class Coded(DeltaNet):
    name = "deltanet_coded"
    published_name = "DeltaNetCoded"
    round_writes = True


class Mixed(DeltaNet):
    """Keys and queries through a learned map a head, the identity at first."""

    name = "deltanet_mixed"
    published_name = "DeltaNetMixed"
    mixes: ClassVar[bool] = True
    states: ClassVar[int] = 1
    tau: ClassVar[float] = 16.0

    def build(self) -> None:
        super().build()
        if self.mixes:
            self.q_mix = HeadLinear(self.heads, self.head_dim)
            self.k_mix = HeadLinear(self.heads, self.head_dim)
        if self.states > 1:
            self.q_route = nn.Parameter(torch.empty(self.heads, self.head_dim, self.states))
            self.k_route = nn.Parameter(torch.empty(self.heads, self.head_dim, self.states))

    def reset_gates(self) -> None:
        super().reset_gates()
        if self.mixes:
            nn.init.zeros_(self.q_mix.weight)
            nn.init.zeros_(self.k_mix.weight)
        if self.states > 1:
            route = torch.nn.functional.normalize(torch.randn_like(self.q_route), dim=1)
            self.q_route.copy_(route)
            self.k_route.copy_(route)

    def init_state(self, batch, device):
        P = self.head_dim
        return {"state": torch.zeros(batch, self.heads * self.states, P, P, device=device)}

    def step_rule(self):
        return None

    def scan(self, q, k, v, gates, state):
        beta = gates["beta"]
        if self.mixes:
            q, k = (x.float() + mix(x) for x, mix in ((q, self.q_mix), (k, self.k_mix)))
        if self.states == 1:
            o, new = run(self, q, k, v, beta, state["state"])
            return o, {"state": new}
        wq, wk = (
            torch.softmax(self.tau * torch.matmul(l2_norm(x), route.float()), -1)
            for x, route in ((q, self.q_route), (k, self.k_route))
        )
        q, k, v = (x.repeat_interleave(self.states, dim=1) for x in (q, k, v))
        beta = (beta.unsqueeze(-1) * wk).transpose(2, 3).flatten(1, 2)
        o, new = run(self, q, k, v, beta, state["state"])
        o = (o.float().unflatten(1, (self.heads, self.states)) * wq.transpose(2, 3).unsqueeze(-1)).sum(2)
        return o, {"state": new}


class Hashed(Mixed):
    name = "deltanet_hashed"
    published_name = "DeltaNetHashed"
    mixes = False
    states = R


class MixedHashed(Mixed):
    name = "deltanet_mixed_hashed"
    published_name = "DeltaNetMixedHashed"
    states = R


class States(DeltaNet):
    """R states a head, each with gates of its own, learned from x."""

    name = "deltanet_states"
    published_name = "DeltaNetStates"
    states: ClassVar[int] = R

    def build(self) -> None:
        super().build()
        self.b_proj = nn.Linear(self.hidden_size, self.heads * self.states, bias=False)
        self.s_proj = nn.Linear(self.hidden_size, self.heads * self.states, bias=False)

    def write_gates(self, x):
        return {"beta": torch.sigmoid(head_gate(self.b_proj, x).float()), "seen": head_gate(self.s_proj, x).float()}

    def step_gates(self, x):
        return {name: Gate(gate) for name, gate in self.write_gates(x).items()}

    closed_gates: ClassVar = {"beta": 0.0, "seen": 0.0}
    init_state = Mixed.init_state

    def step_rule(self):
        return None

    def scan(self, q, k, v, gates, state):
        q, k, v = (x.repeat_interleave(self.states, dim=1) for x in (q, k, v))
        o, new = run(self, q, k, v, gates["beta"], state["state"])
        self._o = o
        return o, {"state": new}

    def read_out(self, o, x):
        seen = torch.sigmoid(head_gate(self.s_proj, x).float()).unsqueeze(-1)
        o = (o.float() * seen).unflatten(1, (self.heads, self.states)).sum(2)
        return super().read_out(o, x)


class Hashed2(Hashed):
    name = "deltanet_hashed2"
    published_name = "DeltaNetHashed2"
    states = 2


class Hashed8(Hashed):
    name = "deltanet_hashed8"
    published_name = "DeltaNetHashed8"
    states = 8


class Shared(Hashed):
    """The query heads of a key head share its states: R states a key head. (Here each head computes them anew.)"""

    name = "deltanet_shared"
    published_name = "DeltaNetShared"
    groups = 4

    def write_gates(self, x):
        beta = super().write_gates(x)["beta"]
        return {"beta": beta[:, :: self.groups].repeat_interleave(self.groups, 1)}

    def scan(self, q, k, v, gates, state):
        own = self.k_route
        shared = own[:: self.groups].repeat_interleave(self.groups, 0)
        beta = gates["beta"]
        wq = torch.softmax(self.tau * torch.matmul(l2_norm(q), self.q_route.float()), -1)
        wk = torch.softmax(self.tau * torch.matmul(l2_norm(k), shared.float()), -1)
        q, k, v = (x.repeat_interleave(self.states, dim=1) for x in (q, k, v))
        beta = (beta.unsqueeze(-1) * wk).transpose(2, 3).flatten(1, 2)
        o, new = run(self, q, k, v, beta, state["state"])
        o = (o.float().unflatten(1, (self.heads, self.states)) * wq.transpose(2, 3).unsqueeze(-1)).sum(2)
        return o, {"state": new}


class Cold(Hashed):
    """Softer routing."""

    name = "deltanet_hashed_soft"
    published_name = "DeltaNetHashedSoft"
    tau = 4.0

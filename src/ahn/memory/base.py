"""What every memory is: gates that decide a write, a recurrent state, a scan over evicted tokens, and a read-out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

INIT_STD = 0.02


class HeadLinear(nn.Module):
    """One (P, P) matrix a head: `y[h] = x[h] @ weight[h]`, x (B, H, N, P)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.to(self.weight.dtype), self.weight)


class Memory(nn.Module, ABC):
    """A recurrent memory of one decoder layer, with one state a query head.

    Shapes: B batch, N tokens, D hidden size, H query heads, P head dim. Keys and values arrive repeated to H heads.

    Args:
        hidden_size: D.
        heads: H.
        head_dim: P.
        q_proj: give the memory its own per-head projection of the query (spec option `q_proj`).
    """

    name: ClassVar[str]
    """The name in `AHNConfig.memory`."""
    published_name: ClassVar[str]
    """The name in published checkpoints (`_ahn_implementation`)."""
    closed_gates: ClassVar[dict[str, float]]
    """For each write gate, the value at which a token leaves the state untouched."""

    def __init__(self, hidden_size: int, heads: int, head_dim: int, q_proj: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.heads, self.head_dim = hidden_size, heads, head_dim
        self.build()
        self.o_proj = HeadLinear(heads, head_dim)
        self.q_proj = HeadLinear(heads, head_dim) if q_proj else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values for training. `o_proj` is zero, so a new student is exactly sinks + window."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.o_proj.weight)
        if self.q_proj is not None:
            nn.init.normal_(self.q_proj.weight, std=INIT_STD)
        self.reset_gates()

    def init_state(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """The empty memory: one float32 matrix (B, H, P_key, P_value)."""
        return {"state": torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device)}

    @abstractmethod
    def build(self) -> None:
        """Create the parameters, named as in published checkpoints (all but `o_proj` and `q_proj`)."""

    @abstractmethod
    def reset_gates(self) -> None:
        """Initial values of the parameters that are not plain projections."""

    @abstractmethod
    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        """Gates of the tokens with attention input x (B, N, D): float32 tensors (B, H, N, ...), keyed as `closed_gates`."""

    @abstractmethod
    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Write N tokens in order; query n reads after token n was written.

        Args:
            q, k, v: (B, H, N, P), after RoPE.
            gates: of the written tokens, from `write_gates`.
            state: before the first write.

        Returns:
            The raw read (B, H, N, P) in float32 and the state after the last write.
        """

    @abstractmethod
    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalise, gate and project the raw read o (B, H, N, P) of tokens with attention input x (B, N, D).

        Returns (B, H, N, P), to be added to the exact attention's output before the base model's own `o_proj`.
        """


def head_gate(projection: nn.Linear, x: Tensor) -> Tensor:
    """One number a head and token: x (B, N, D) to (B, H, N), computed in the projection's own precision."""
    return projection(x.to(projection.weight.dtype)).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dimension in float32, as a float32 tensor."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σx² + eps) over the last dimension, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)

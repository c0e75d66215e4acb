"""How one memory writes and reads, in the terms that every kernel knows."""

import dataclasses

from torch import Tensor

from ahn.ops.routes import Routes


@dataclasses.dataclass(frozen=True)
class StepRule:
    """How one memory writes and reads, in the terms of `ahn.ops` (docs/spec.md, section 3).

    With w the write gate and g the logarithm of the decay: `S ← exp(g) S; u = w (v - [delta] Sᵀ k̂); S ← S + k̂ uᵀ;
    o = Sᵀ q̂ · scale`, then `RMSNorm(o; across one head) · silu(γ)` or `RMSNorm(o · silu(γ); across all heads)`.
    """

    write: str
    """Name of the gate that scales a write."""
    decay: str | None
    """Name of the gate that is the logarithm of the decay."""
    delta: bool
    """Subtract what the state predicts."""
    l2_eps: float
    """q̂ = q / sqrt(Σq² + eps), and so k̂."""
    scale: float
    norm_eps: float
    across_heads: bool


@dataclasses.dataclass
class StepRead:
    """What the read of a memory needs besides the state.

    Attributes:
        query: (B, Hq, P) the memory's query, like those of attention before or after RoPE.
        gamma: (B, Hq) the output gate before its activation.
        weight: (B, Hq) float32 the router's weight of the read, or None.
        norm: (P,) or (Hq · P,) weight of the norm.
        o_proj: (Hq, P, P).
        routes: how keys and queries choose among several states per key head; None where each query head has one.
    """

    query: Tensor
    gamma: Tensor
    weight: Tensor | None
    norm: Tensor
    o_proj: Tensor
    routes: Routes | None = None

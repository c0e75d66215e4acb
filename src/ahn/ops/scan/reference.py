"""The recurrences, one token at a time, in float32 (or the inputs' float64). Every fast path is compared with these.

Shapes: k, v (B, H, N, P); beta, decay (B, H, N); state (B, H, P_key, P_value); q (B, H, N, P), or of the delta rule
(B, H · G, N, P), where G queries that follow one another read each state. `decay` is a logarithm, ≤ 0.
"""

import torch
from torch import Tensor


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`S ← exp(g) S; u = β (v - Sᵀ k); S ← S + k uᵀ; o = Sᵀ q` (arXiv 2412.06464, equation 10; no decay: DeltaNet)."""
    reads = []
    for n in range(q.shape[2]):
        if decay is not None:
            state = state * decay[:, :, n, None, None].exp()
        update = beta[:, :, n, None] * (v[:, :, n] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, n]))
        state = state + k[:, :, n, :, None] * update[:, :, None, :]
        readers = q[:, :, n].unflatten(1, (state.shape[1], -1))
        reads.append(torch.einsum("bhkv,bhgk->bhgv", state, readers).flatten(1, 2))
    return torch.stack(reads, dim=2), state


def decay_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`S ← exp(g) S + k vᵀ; o = Sᵀ q` (arXiv 2405.21060, equation 16 with a scalar decay)."""
    reads = []
    for n in range(q.shape[2]):
        state = state * decay[:, :, n, None, None].exp() + k[:, :, n, :, None] * v[:, :, n, None, :]
        reads.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, n]))
    return torch.stack(reads, dim=2), state

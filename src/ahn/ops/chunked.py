"""The recurrences in chunks: matrix products inside a chunk, one state update a chunk. Pure torch, any device.

Inside a chunk of C tokens with cumulative log decay G, token i sees token j ≤ i through `D_ij = exp(G_i - G_j)`. For
the delta rule the updates u solve the unit lower triangular system `(I + A) u = β (v - exp(G) Sᵀ k)` with
`A_ij = β_i D_ij k_i·k_j` for j < i (the WY form of arXiv 2406.06484, section 3, with decay as in 2412.06464).
Shapes as in `reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def _split(x: Tensor, chunk: int) -> Tensor:
    """(B, H, N, ...) to (B, H, N/C, C, ...), padded with zeros: a zero token changes no state, its read is dropped."""
    pad = -x.shape[2] % chunk
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad))
    return x.unflatten(2, (-1, chunk))


def _decay_matrix(cumulative: Tensor) -> Tensor:
    """D_ij = exp(G_i - G_j) for j ≤ i, else 0; masked before exp so that no overflow reaches the gradient."""
    difference = cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)
    future = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(future, float("-inf")).exp()


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """See `reference.delta_rule`."""
    N = q.shape[2]
    if decay is None:
        decay = torch.zeros_like(beta)
    q, k, v, beta, decay = (_split(x, chunk) for x in (q, k, v, beta, decay))
    G = decay.cumsum(-1)
    D = _decay_matrix(G)
    k_beta = k * beta.unsqueeze(-1)
    A = ((k_beta @ k.mT) * D).tril(-1)
    system = A + torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    # One solve gives both parts of u = solve(β v) - solve(β exp(G) k) S.
    right = torch.cat([v * beta.unsqueeze(-1), k_beta * G.exp().unsqueeze(-1)], dim=-1)
    from_v, from_k = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], dim=-1
    )
    total = G[..., -1:, None]
    k_out = (k * (total - G.unsqueeze(-1)).exp()).mT
    # A chunk takes its state S to `forget S + learn`: one product a chunk is all that has to wait for the one before.
    forget = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) * total.exp() - k_out @ from_k
    learn = k_out @ from_v
    before = []
    for forget_c, learn_c in zip(forget.unbind(2), learn.unbind(2), strict=True):
        before.append(state)
        state = forget_c @ state + learn_c
    states = torch.stack(before, dim=2)
    local = (q @ k.mT) * D
    reads = (q * G.exp().unsqueeze(-1)) @ states + local @ (from_v - from_k @ states)
    return reads.flatten(2, 3)[:, :, :N], state


def decay_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """See `reference.decay_rule`."""
    N = q.shape[2]
    q, k, v, decay = (_split(x, chunk) for x in (q, k, v, decay))
    G = decay.cumsum(-1)
    total = G[..., -1:, None]
    learn = (k * (total - G.unsqueeze(-1)).exp()).mT @ v
    before = []
    for keep, learn_c in zip(total.exp().unbind(2), learn.unbind(2), strict=True):
        before.append(state)
        state = torch.addcmul(learn_c, state, keep)
    reads = (q * G.exp().unsqueeze(-1)) @ torch.stack(before, dim=2) + ((q @ k.mT) * _decay_matrix(G)) @ v
    return reads.flatten(2, 3)[:, :, :N], state

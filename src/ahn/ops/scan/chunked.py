"""The recurrences in chunks: matrix products inside a chunk, one state update per chunk. Pure torch, any device.

Inside a chunk of C tokens with cumulative log decay G, token i sees token j ≤ i through `D_ij = exp(G_i - G_j)`. For
the delta rule the updates u solve the unit lower triangular system `(I + A) u = β (v - exp(G) Sᵀ k)` with
`A_ij = β_i D_ij k_i·k_j` for j < i (the WY form of arXiv 2406.06484, section 3, with decay as in 2412.06464).
Shapes as in `reference`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def _split(x: Tensor, chunk: int) -> Tensor:
    """(B, H, N, ...) to (B, H, N/C, C, ...), padded with zeros: a zero token changes no state, its read is dropped.

    C is `chunk`, or the next power of two where there are fewer tokens.
    """
    chunk = min(chunk, 1 << (x.shape[2] - 1).bit_length())
    pad = -x.shape[2] % chunk
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad))
    return x.unflatten(2, (-1, chunk))


def decay_matrix(cumulative: Tensor) -> Tensor:
    """D_ij = exp(G_i - G_j) for j ≤ i, else 0; masked before exp so that no overflow reaches the gradient."""
    difference = cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)
    future = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(future, float("-inf")).exp()


class UnitLowerInverse(torch.autograd.Function):
    """`(I + A)⁻¹` for strictly lower triangular A (..., C, C), C a power of two, in log₂ C rounds of matrix products.

    Each round joins neighbouring diagonal blocks, `[[T₁, 0], [-T₂ A₂₁ T₁, T₂]]`: forward substitution in blocks, as
    stable as the solve it stands for, and without LAPACK's one call a matrix.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        C = A.shape[-1]
        T = torch.ones(*A.shape[:-2], C, 1, 1, dtype=A.dtype, device=A.device)
        size = 1
        while size < C:
            pairs = A.unflatten(-2, (-1, 2 * size)).unflatten(-1, (-1, 2 * size))
            corner = pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., size:, :size]
            first, second = T[..., 0::2, :, :], T[..., 1::2, :, :]
            T = torch.cat(
                [
                    torch.cat([first, torch.zeros_like(first)], dim=-1),
                    torch.cat([-second @ corner @ first, second], dim=-1),
                ],
                dim=-2,
            )
            size *= 2
        T = T.squeeze(-3)
        ctx.save_for_backward(T)
        return T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (T,) = ctx.saved_tensors
        return -(T.mT @ grad @ T.mT).tril(-1)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """See `reference.delta_rule`."""
    N = q.shape[2]
    if decay is None:
        decay = torch.zeros_like(beta)
    q, k, v, beta, decay = (_split(x, chunk) for x in (q, k, v, beta, decay))
    G = decay.cumsum(-1)
    D = decay_matrix(G)
    k_beta = k * beta.unsqueeze(-1)
    A = ((k_beta @ k.mT) * D).tril(-1)
    inverse = UnitLowerInverse.apply(A)
    # The two parts of u = inverse β v - (inverse β exp(G) k) S.
    from_v, from_k = inverse @ (v * beta.unsqueeze(-1)), inverse @ (k_beta * G.exp().unsqueeze(-1))
    total = G[..., -1:, None]
    k_out = (k * (total - G.unsqueeze(-1)).exp()).mT
    # A chunk takes its state S to `forget S + learn`: one product per chunk is all that has to wait for the one before.
    forget = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) * total.exp() - k_out @ from_k
    learn = k_out @ from_v
    before = []
    for forget_c, learn_c in zip(forget.unbind(2), learn.unbind(2), strict=True):
        before.append(state)
        state = forget_c @ state + learn_c
    states = torch.stack(before, dim=2)
    # Where several queries read a state, a chunk has as many times more rows.
    q = q.unflatten(1, (k.shape[1], -1)).movedim(2, 3)
    each = q.shape[3:5]
    D, G = (x.unsqueeze(3).expand(-1, -1, -1, each[0], *x.shape[3:]).flatten(3, 4) for x in (D, G))
    q = q.flatten(3, 4)
    local = (q @ k.mT) * D
    reads = (q * G.exp().unsqueeze(-1)) @ states + local @ (from_v - from_k @ states)
    return reads.unflatten(3, each).movedim(3, 2).flatten(3, 4).flatten(1, 2)[:, :, :N], state


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
    reads = (q * G.exp().unsqueeze(-1)) @ torch.stack(before, dim=2) + ((q @ k.mT) * decay_matrix(G)) @ v
    return reads.flatten(2, 3)[:, :, :N], state

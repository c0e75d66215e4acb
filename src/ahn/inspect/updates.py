"""What a recurrent memory really adds to its state, token by token, without a state for every token."""

import torch
from torch import Tensor

from ahn.ops.routes import Routes
from ahn.ops.rule import StepRule
from ahn.ops.scan.chunked import decay_matrix

CHUNK = 64


def updates(
    key: Tensor,
    value: Tensor,
    write: Tensor,
    decay: Tensor | None,
    state: Tensor,
    rule: StepRule,
    routes: Routes | None = None,
) -> tuple[Tensor, Tensor]:
    """Size of every update `k̂ uᵀ` and of the state after it, in chunks of matrix products.

    The state itself need not be kept for its norm: `S ← exp(g) S + k̂ uᵀ` makes
    `‖S‖² ← exp(2g) ‖S‖² + 2 exp(g) k̂ᵀS u + ‖k̂‖² ‖u‖²`, and what the state predicts,
    `exp(g) Sᵀk̂`, is needed for u anyway.

    Args:
        key, value: (B, Hkv, m, P) of the written tokens, after RoPE.
        write: (B, Hw, m) gate, Hw heads that write.
        decay: (B, Hw, m) logarithm of the decay, or None.
        state: (B, Hw · R, P, P) before the first write.
        rule, routes: the memory's.

    Returns:
        ‖k̂ uᵀ‖ and the Frobenius norm of the state after it, both (B, Hw, m) float32; of a head's R states together.
    """
    heads = write.shape[1]
    if routes is not None:
        key, write = routes.keys(key.float(), write)
    if decay is None:
        decay = torch.zeros_like(write)
    state = state.float()
    sizes, norms = [], []
    for start in range(0, write.shape[2], CHUNK):
        here = slice(start, start + CHUNK)
        k, v = (x[:, :, here].float().repeat_interleave(write.shape[1] // x.shape[1], 1) for x in (key, value))
        w, G = write[:, :, here, None].float(), decay[:, :, here].float().cumsum(-1)
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + rule.l2_eps)
        D = decay_matrix(G)
        earlier = ((k @ k.mT) * D).tril(-1)
        carried = (k @ state) * G.exp().unsqueeze(-1)
        u = w * (v - carried) if rule.delta else w * v
        if rule.delta:  # (I + w · earlier) u = w (v - carried)
            system = torch.eye(k.shape[2], device=k.device) + w * earlier
            u = torch.linalg.solve_triangular(system, u, upper=False, unitriangular=True)
        predicted = carried + earlier @ u
        size = (k.square().sum(-1) * u.square().sum(-1)).sqrt()
        gain = size.square() + 2 * (predicted * u).sum(-1)
        square = (2 * G).exp() * state.square().sum((-2, -1))[..., None] + (D.square() @ gain[..., None])[..., 0]
        sizes.append(size)
        norms.append(square.clamp_min(0).sqrt())
        last = G[..., -1:, None]
        state = last.exp() * state + (k * (last - G.unsqueeze(-1)).exp()).mT @ u
    size, norm = (torch.cat(parts, dim=2).unflatten(1, (heads, -1)).square().sum(2).sqrt() for parts in (sizes, norms))
    return size, norm

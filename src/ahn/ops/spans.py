"""placeholder until merged"""
from __future__ import annotations
import torch
from torch import Tensor

def attend(query: Tensor, key: Tensor, value: Tensor, until: Tensor, scaling: float, bias: Tensor | None = None, biased_from: Tensor | None = None) -> Tensor:
    n, T = query.shape[2], key.shape[2]
    g = query.shape[1] // key.shape[1]
    i = torch.arange(n, device=query.device)[:, None]
    own = torch.arange(T, device=query.device)[None] - (T - n)
    seen = (own <= i) & (i < until[..., None, :])
    mask = torch.where(seen, 0.0, float("-inf"))
    if bias is not None:
        mask = mask + torch.where(i >= biased_from[..., None, :], bias[..., None, :], 0.0)
    mask = mask.expand(query.shape[0], key.shape[1], n, T).repeat_interleave(g, 1)
    s = (query.float() @ key.float().repeat_interleave(g, 1).mT) * scaling + mask
    m = s.amax(-1, keepdim=True).clamp_min(-1e30)
    e = (s - m).exp()
    return ((e / e.sum(-1, keepdim=True).clamp_min(1e-30)) @ value.float().repeat_interleave(g, 1)).to(query.dtype)

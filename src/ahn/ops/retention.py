"""Which tokens a fixed number of slots still holds, when each new token takes the place of the least important one.

Tokens arrive one by one, each with a priority. After every arrival the C most important ones are kept; of two equal
ones the older. What has been dropped never comes back, since the tokens that outrank it only grow in number. So a
token's stay is an interval that ends with one arrival, and all intervals of a sequence can be found without going
through it token by token: that is what training needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # arrivals compared at once with all that are held: (C + BLOCK) × BLOCK numbers a head


def dropped_at(held: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """When each token is dropped.

    Args:
        held: (..., C) priorities of the tokens held, highest first; free slots are -inf.
        arriving: (..., m) priorities of the tokens that arrive, in order; one of -inf is never kept.

    Returns:
        For held (..., C) and arriving (..., m) tokens, int64, the index of the arrival that drops it (its own if it is
        never kept; m if it is there at the end); and (..., C) indices into [held | arriving] of the tokens kept at the
        end, highest priority first.
    """
    C, m = held.shape[-1], arriving.shape[-1]
    device = held.device
    ends = torch.full((*held.shape[:-1], C + m), m, device=device)
    index = torch.arange(C, device=device).expand(held.shape)
    for start in range(0, m, BLOCK):
        new = arriving[..., start : start + BLOCK]
        own = torch.arange(new.shape[-1], device=device)
        priority = torch.cat([held, new], dim=-1)
        index = torch.cat([index, (C + start + own).expand(new.shape)], dim=-1)
        # How many tokens outrank each one: the held ones at once, then those that arrive, as they come.
        above = (held[..., None, :] >= new[..., None]).sum(-1)
        above = torch.cat([torch.arange(C, device=device).expand(held.shape), above], dim=-1)
        age = torch.cat([torch.full((C,), -1, device=device), own])
        outranks = new[..., None, :] > priority[..., None]
        outranks |= (new[..., None, :] == priority[..., None]) & (own < age[:, None])
        rank = above[..., None] + outranks.cumsum(-1, dtype=torch.int32)
        stays = torch.maximum((rank < C).sum(-1), age.clamp_min(0))
        gone = stays < len(own)
        ends.scatter_(-1, index, torch.where(gone, start + stays, m))
        order = priority.argsort(dim=-1, descending=True, stable=True)[..., :C]
        held, index = priority.gather(-1, order), index.gather(-1, order)
    return ends[..., :C], ends[..., C:], index

"""Exact slots: some of the tokens that leave the window are kept as they are, chosen by a learned importance.

Every key/value head has C slots. A token that leaves the window takes the place of the least important one there, or
is dropped at once; attention sees what is held exactly, at its own distance. C is three times the window: at an equal
budget of T exact keys, a quarter is spent on the latest tokens and the rest on the most important ones.

A token's importance s comes from its own x when it enters. While it is held, log sigmoid(s) is added to its attention
scores: that is how the choice is learned by gradient (the idea of retention gates, arXiv 2512.03324). While training,
priorities get Gumbel noise, so that what is not yet thought important is tried as well, and a held token has a price,
without which nothing would ever lower an importance that only has no effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ahn.memory.base import INIT_STD, Memory, head_gate

SHARE = 3
"""Slots for each token of the window."""
RECENCY = 1 / 4096
"""What a token's priority gains on an older one for each token between them."""
PRICE = 0.03
"""Nats of the summed loss that holding one token with one head has to save."""
START = 1.0
"""Importance before training: seen at sigmoid(1) = 73 % of its weight, and with a gradient that has not vanished."""


class ExactSlots(Memory):
    """Learned exact slots, and nothing else of what left the window."""

    name = "slots"
    published_name = "ExactSlots"
    closed_gates = {"importance": float("-inf")}  # noqa: RUF012  (a constant of the class)
    keeps_slots = True

    def __init__(self, hidden_size: int, heads: int, head_dim: int, q_proj: bool = False) -> None:
        super().__init__(hidden_size, heads, head_dim, q_proj)
        self.importance_proj = nn.Linear(hidden_size, heads)
        nn.init.normal_(self.importance_proj.weight, std=INIT_STD)
        nn.init.constant_(self.importance_proj.bias, START)

    def slot_count(self, window: int) -> int:
        return SHARE * window

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        return super().write_gates(x) | {"importance": head_gate(self.importance_proj, x).float()}

    def importance(self, gate: Tensor, kv_heads: int) -> Tensor:
        """Of evicted tokens, for each key/value head: the mean of its query heads' gates (B, H, m), (B, Hkv, m)."""
        score = gate.unflatten(1, (kv_heads, -1)).mean(2)
        return _Priced.apply(score) if score.requires_grad else score

    @staticmethod
    def priority(score: Tensor, positions: Tensor) -> Tensor:
        """What decides who is kept, of tokens with importance (B, Hkv, m) at positions (B or 1, m).

        Under gradients it is a sample without replacement (Gumbel top-k) instead of the highest.
        """
        priority = score.detach() + RECENCY * positions[:, None]
        if not score.requires_grad:
            return priority
        uniform = torch.rand_like(priority).clamp(1e-20, 1 - 1e-7)  # the logarithms stay finite
        return priority - torch.log(-torch.log(uniform))


class _Priced(torch.autograd.Function):
    """The identity, whose gradient is that of `PRICE · sigmoid(score)` a token besides that of the loss."""

    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        ctx.save_for_backward(score)
        return score.view_as(score)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (score,) = ctx.saved_tensors
        held = torch.sigmoid(score)
        # The loss is a mean over about as many positions as there are tokens here.
        return grad + PRICE * held * (1 - held) / (score.shape[0] * score.shape[2])

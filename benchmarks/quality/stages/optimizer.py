"""Muon, batched: momentum whose matrices are made orthogonal by Newton-Schulz before each step.

Keller Jordan, https://kellerjordan.github.io/posts/muon, with the step scaled to AdamW's size as in arXiv 2502.16982.
torch.optim.Muon takes one matrix at a time, which on a model of this size costs more than the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A quintic with a steep slope at 0 that sends singular values in (0, 1] to about [0.7, 1.2] in five rounds (the post).
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


def orthogonalise(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: x (n, rows, columns) with rows ≤ columns, computed in bfloat16."""
    y = x.bfloat16()
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = y @ y.mT
        y = A * y + (B * gram + C * gram @ gram) @ y
    return y


class Muon(torch.optim.Optimizer):
    """For 2-D parameters. All matrices of one shape are one batch."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters, beta = group["params"], group["momentum"]
            gradient = torch.stack([p.grad for p in parameters])
            state = self.state[parameters[0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - beta)
            update = gradient.lerp(average, beta)
            tall = update.shape[1] > update.shape[2]
            update = orthogonalise(update.mT if tall else update)
            update = (update.mT if tall else update).to(gradient.dtype)
            size = 0.2 * max(update.shape[1:]) ** 0.5  # root mean square 0.2, like AdamW's
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"] * size)

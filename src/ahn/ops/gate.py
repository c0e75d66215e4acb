"""A gate in parts, so that a kernel can finish what a projection began."""

import dataclasses
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "sigmoid", "softplus")


@dataclasses.dataclass(frozen=True)
class Gate:
    """One number per head and token, `f(logits + shift)`; with a rate, `-exp(log_rate) · f(logits + shift)`.

    Attributes:
        logits: (B, H, ...) in any precision.
        activation: f, one of `ACTIVATIONS`.
        shift, log_rate: (H,) or None.
    """

    logits: Tensor
    activation: str = "none"
    shift: Tensor | None = None
    log_rate: Tensor | None = None

    def value(self) -> Tensor:
        """The gate itself, float32 in the shape of the logits."""
        x = self.logits.float()
        if self.shift is not None:
            x = x + self._per_head(self.shift)
        if self.activation == "sigmoid":
            x = torch.sigmoid(x)
        elif self.activation == "softplus":
            x = F.softplus(x)
        return x if self.log_rate is None else -self._per_head(self.log_rate).exp() * x

    def first(self) -> Self:
        """Of the first token alone: (B, H, N) to (B, H)."""
        return dataclasses.replace(self, logits=self.logits[:, :, 0])

    def _per_head(self, x: Tensor) -> Tensor:
        return x.float().view(-1, *[1] * (self.logits.dim() - 2))

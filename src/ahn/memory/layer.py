"""The modules that `attach` adds to a decoder layer, named as published: `ahn.fn.*` and `ahn_router.*`."""

import torch
from torch import Tensor, nn

from ahn.layout.state import LayerState
from ahn.memory import Memory
from ahn.ops.basis import Basis
from ahn.ops.step.retained import SeenTokens


class AHN(nn.Module):
    """Holds a layer's memory as `fn`, and the layer's index when it was attached."""

    def __init__(self, fn: Memory, index: int) -> None:
        super().__init__()
        self.fn, self.index = fn, index
        self.step_state: LayerState | None = None
        """Of the conversation, in a module that captured steps run with (`ahn.decode.twin`)."""
        self.step_seen: SeenTokens | None = None
        """Likewise, the tokens that its memory keeps."""
        self.step_basis: Basis | None = None
        """Likewise, in which the tier's keys are coded."""


class Router(nn.Module):
    """Weight of the memory's read, which grows with what was written: `sigmoid(alpha · log(r) + beta)` per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(heads))
        self.beta = nn.Parameter(torch.zeros(heads))

    def forward(self, r: Tensor) -> Tensor:
        """r (B, N), tokens written so far / window, to weights (B, H, N). An empty memory reads zero anyway."""
        log_r = r.clamp_min(1e-6).log()[:, None, :]
        return torch.sigmoid(self.alpha.float()[:, None] * log_r + self.beta.float()[:, None])


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of what `attach` added to a model, by full name."""
    return {name: p for name, p in model.named_parameters() if ".ahn." in name or ".ahn_router." in name}

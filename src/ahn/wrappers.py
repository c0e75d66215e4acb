"""The transformers model inside what others put around it: PEFT, DistributedDataParallel, torch.compile."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ahn.errors import AHNError


def unwrapped(model: Any) -> Any:
    """The outermost transformers model in `model`, which is itself where nothing is around it."""
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return model
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)


def attached(model: Any) -> Any:
    """The model in `model` that `ahn.attach` was applied to.

    Raises:
        AHNError: there is none.
    """
    inner = unwrapped(model)
    if getattr(inner, "_ahn", None) is None:
        raise AHNError("This model has no AHN; call ahn.attach(model, ahn.AHNConfig(...)) first.")
    return inner

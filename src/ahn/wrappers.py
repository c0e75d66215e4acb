"""The transformers model inside what others put around it: PEFT, DistributedDataParallel, torch.compile."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ahn.errors import AHNError, named


def unwrapped(model: Any) -> Any:
    """The outermost transformers model in `model`, which is itself where nothing is around it.

    Raises:
        AHNError: there is none.
    """
    inside = model.modules() if isinstance(model, nn.Module) else ()
    for part in inside:
        if isinstance(part, PreTrainedModel):
            return part
    raise AHNError(
        f"This takes a loaded transformers model, not {named(model)}: load one with "
        "transformers.AutoModelForCausalLM.from_pretrained or ahn.from_pretrained first."
    )


def attached(model: Any) -> Any:
    """The model in `model` that `ahn.attach` was applied to.

    Raises:
        AHNError: there is none.
    """
    inner = unwrapped(model)
    if getattr(inner, "_ahn", None) is None:
        raise AHNError("This model has no AHN; call ahn.attach(model, ahn.AHNConfig(...)) first.")
    return inner

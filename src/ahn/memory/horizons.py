"""How a new memory begins, where that is not what the paper's code does."""

import torch
from transformers import PreTrainedModel

from ahn.memory import RecurrentMemory
from ahn.wrappers import decoder_of


def start_with_horizons(model: PreTrainedModel, shortest: float, longest: float) -> None:
    """Let the heads of each layer begin by forgetting with e-folds of `shortest` to `longest` tokens.

    They are spread evenly in the logarithm over a layer's heads. A memory that never forgets (DeltaNet) stays as it is.
    A brief training hardly moves decay rates: a head then remembers as long as it began with (docs/results.md).
    `ahn train` calls this; `ahn.attach` alone leaves the published start.

    Args:
        model: one that has a new memory, before its first step.
        shortest, longest: e-folds in tokens, 0 < shortest ≤ longest.
    """
    for layer in decoder_of(model).layers:
        memory = layer.ahn.fn if hasattr(layer, "ahn") else None
        if isinstance(memory, RecurrentMemory):
            places = torch.linspace(0, 1, memory.heads, device=memory.o_proj.weight.device)
            memory.start_with_horizons(shortest * (longest / shortest) ** places)

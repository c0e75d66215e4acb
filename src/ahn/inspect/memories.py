"""Which layers of a model have a memory with a state to look into, and which tokens a forward writes."""

from torch import Tensor
from transformers import PreTrainedModel

from ahn.errors import AHNError
from ahn.layout.visibility import Visibility
from ahn.memory import RecurrentMemory
from ahn.wrappers import attached, decoder_of


def recurrent_layers(model: PreTrainedModel) -> dict[int, RecurrentMemory]:
    """The recurrent memories of an adapted model, by layer.

    Raises:
        AHNError: the model has no AHN, or one without a state.
    """
    model = attached(model)
    named = {i: layer.ahn.fn for i, layer in enumerate(decoder_of(model).layers) if hasattr(layer, "ahn")}
    found = {i: memory for i, memory in named.items() if isinstance(memory, RecurrentMemory)}
    if not found:
        raise AHNError(
            f"{model.ahn_config.memory} keeps no recurrent state; there is nothing to look into or turn off."
        )
    return found


def written_positions(view: Visibility) -> Tensor:
    """(B or 1, m) position of each token that this forward writes; -1 where a row writes nothing (padding)."""
    view = view.delayed
    written = view.query_positions[:, view.length - view.evicted :] - view.window
    return written if view.writable is None else written.masked_fill(~view.writable, -1)

"""One layer's part of an `AHNCache` where a recurrent mixer works beside the attention, as in Falcon-H1."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import LinearAttentionLayer

from ahn.cache import other
from ahn.cache.layer import AHNLayer
from ahn.cache.progress import Progress
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.layout.state import Change, Tensors


class HybridLayer(AHNLayer, LinearAttentionLayer):
    """An `AHNLayer` that also holds the states of the base's own recurrence, as transformers holds them.

    Of the two parents, `AHNLayer` is asked first: transformers' class updates the recurrent states alone.
    """

    def __init__(
        self, config: AHNConfig, progress: Progress | None = None, rotates: bool = True, number_of_states: int = 1
    ) -> None:
        self.number_of_states = number_of_states
        AHNLayer.__init__(self, config, progress, rotates)  # calls `reset`

    def reset(self) -> None:
        recording = self.record_past
        other.clear_states(self)
        self.record_past = recording
        super().reset()

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the window by position, of the recurrent states by keyword, as transformers' own hybrid layers have it."""
        if args:
            super().lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:
        """Never: a recurrence keeps one state, from which nothing can be taken out again."""
        return False

    def check_crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and other.states(self):
            raise AHNError(other.ONE_STATE)
        super().check_crop(tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.record_past:  # the convolution has kept all its input meanwhile
            LinearAttentionLayer.crop(self, 0)

    def tensors(self) -> Tensors:
        """Those of the attention, and the recurrent states by the names that other layers' have in a file."""
        return super().tensors() | other.states(self)

    def bytes_by_part(self) -> dict[str, int]:
        sizes = super().bytes_by_part()
        return sizes | {"exact": sizes.get("exact", 0) + sum(x.nbytes for x in other.states(self).values())}

    def load_tensors(self, named: Tensors) -> None:
        super().load_tensors(named)
        other.set_states(self, named)

    def offload(self) -> None:
        """The attention alone: transformers leaves recurrent states in place, and the next forward needs them first."""
        AHNLayer.map(self, lambda x: x.to("cpu"))

    def map(self, change: Change) -> None:
        super().map(change)
        other.map_states(self, change)


def with_memory(layer: Any, config: AHNConfig, rotates: bool) -> AHNLayer:
    """An empty layer with a memory in the place of one of transformers' own."""
    if other.recurs(layer):
        return HybridLayer(config, rotates=rotates, number_of_states=layer.number_of_states)
    return AHNLayer(config, rotates=rotates)

"""What a layer's attention is given of that layer alone, besides queries, keys and values."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ahn.cache.conversation import AHNCache
from ahn.cache.layer import AHNLayer
from ahn.cache.waiting import LayerPart
from ahn.layout.state import Tensors
from ahn.memory.layer import AHN, Router


@dataclasses.dataclass
class LayerContext:
    """What the hook on one attention module adds: its memory and the inputs that the attention function lacks."""

    index: int
    """Of the decoder layer; -1 in a captured step, which is compiled once for all layers."""
    ahn: AHN
    router: Router | None
    x: Tensor
    """(B, n, D) the attention's input."""
    cache: AHNCache | None
    cache_layer: AHNLayer | LayerPart | None
    rope: tuple[Tensor, Tensor] | None
    rotates: bool = True
    """The base turns this layer's keys by their positions."""
    gates: Tensors | None = None
    """Write gates of the new tokens; None where nobody has made them of x yet."""

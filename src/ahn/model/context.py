"""What one layer's attention is given besides queries, keys and values."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ahn.cache.conversation import AHNCache
from ahn.cache.layer import AHNLayer
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
    cache_layer: AHNLayer | None
    rope: tuple[Tensor, Tensor] | None

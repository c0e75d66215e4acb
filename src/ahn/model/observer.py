"""`Observer`: looks on while memories write and read, and may change both. `ahn.inspect` is made of these."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ahn.cache.conversation import AHNCache
    from ahn.cache.layer_context import LayerContext
    from ahn.layout.evicted import Evicted
    from ahn.layout.visibility import Visibility
    from ahn.model.route import AttentionCall


@dataclasses.dataclass(frozen=True)
class Passage:
    """What one layer's memory did in one forward, in which m tokens left the window and the last m queries read.

    Attributes:
        module: the base model's attention.
        left: the tokens written; gates of padding are closed.
        before: the memory's state before the first write.
        exact: (B, m, Hq, P) exact attention of the reading queries.
        read: (B, Hq, m, P) what is added to it, before the base model's `o_proj`.
    """

    module: Any
    layer: LayerContext
    view: Visibility
    left: Evicted
    before: dict[str, Tensor]
    exact: Tensor
    read: Tensor


class Observer:
    """Does nothing; a subclass overrides what it needs. Called in ordinary forwards only: captured steps wait."""

    def begin(self, cache: AHNCache | None, view: Visibility) -> None:
        """A forward begins. What is raised here leaves the conversation as it is."""

    def attending(self, layer: LayerContext, call: AttentionCall) -> None:
        """A layer is about to attend: `call` has its queries and keys, `layer.x` what they were made of."""

    def writing(self, layer: LayerContext, left: Evicted) -> Evicted:
        """The tokens to be written instead of `left`."""
        return left

    def reading(self, passage: Passage) -> Tensor:
        """What to add instead of `passage.read`."""
        return passage.read

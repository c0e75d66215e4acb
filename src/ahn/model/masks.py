"""The base model's attention masks: which of a forward's tokens a layer sees, before any window."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ahn.errors import AHNError
from ahn.layout.visibility import Visibility

GAP = (
    "The recurrent layers of this base would take padding amid a text for text: pad on the left, go on with as many "
    "new tokens in each row, or read one row at a time."
)


class LazyMask:
    """The base model's mask, made only if a layer needs it: at 1 M tokens of context nobody could hold it."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._masks: dict[str, Any] = {}
        self._elsewhere: dict[tuple[str, torch.device], Any] = {}
        self._apart: LazyMask | None = None

    def apart(self, documents: Tensor) -> LazyMask:
        """The same for a row of several documents, (L,) by number, of which none sees another.

        transformers knows them by their positions, but not every model of it gives positions to its masks.
        """
        if self._apart is None:
            whole = self._arguments["mask_function"]

            def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return whole(batch, head, query, key) & (documents[query] == documents[key])

            self._apart = LazyMask(**self._arguments | {"mask_function": within, "allow_is_causal_skip": False})
        return self._apart

    def covers(self, view: Visibility) -> bool:
        """The base mask knows all padding: there is none, or the caller gave this forward a 2-D mask."""
        return not view.padded or self._arguments.get("attention_mask") is not None

    def resolve(self, kernel: str, device: torch.device) -> Any:
        """The mask as the base model's own kernel expects it, where the layer is."""
        if kernel not in self._masks:
            make = ALL_MASK_ATTENTION_FUNCTIONS.get(kernel)  # None: one that makes its own, as transformers has it
            self._masks[kernel] = None if make is None else make(**self._arguments)
        mask = self._masks[kernel]
        if mask is None or device == self._arguments.get("device", device):
            return mask
        if (kernel, device) not in self._elsewhere:
            self._elsewhere[kernel, device] = mask.to(device)
        return self._elsewhere[kernel, device]

    @property
    def of_tokens(self) -> Tensor | None:
        """(B, seen + n) False for padding, as the caller gave it; None where there is none."""
        return self._arguments.get("attention_mask")

    @property
    def looks_ahead(self) -> bool:
        """Whether some new token sees a later one: those of an image see all of it."""
        return self._ahead is not None

    def ahead(self, device: torch.device) -> Tensor | None:
        """(B, 1, n, n) True where a new token sees a later one; None where none does."""
        return None if self._ahead is None else self._ahead.to(device)

    @cached_property
    def _ahead(self) -> Tensor | None:
        new = self._arguments["q_length"]
        if new == 1 or self._arguments.get("allow_is_causal_skip", True):  # nobody has put anything on a causal mask
            return None
        first = self._arguments["kv_offset"] + self._arguments["kv_length"] - new
        among_new = self._arguments | {"kv_length": new, "kv_offset": first}
        ahead = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**among_new).triu(1)
        return ahead if bool(ahead.any()) else None


def check_gaps(mask: Any, new: int) -> None:
    """For a base with recurrent layers: of padding, transformers keeps out of a recurrence what comes before a text.

    Args:
        mask: (B, seen + new) zero for padding; whatever else is not looked at.

    Raises:
        AHNError: in some row a new token follows padding that follows text.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return
    real = mask.bool()
    gap = ~real & (real.cumsum(1) > 0)
    if bool((real & (gap.cumsum(1) > 0))[:, -new:].any()):
        raise AHNError(GAP)


def of_images(mask: Any) -> bool:
    """Whether what is around the decoder lets some layer see ahead, within an image."""
    return isinstance(mask, dict) and any(isinstance(one, LazyMask) and one.looks_ahead for one in mask.values())


def of_tokens(mask: Any) -> Any:
    """The caller's mask of tokens, also where what is around the decoder has made it one for each kind of layer."""
    one = mask.get("full_attention") if isinstance(mask, dict) else mask
    return one.of_tokens if isinstance(one, LazyMask) else mask

"""What `attach` notes about a model, and what holds inside a block of code alone: `disabled`, `observed`.

Such a block is the business of the thread (or asyncio task) that is in it; others use the same model meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ahn.decode.compiled import CompiledParts
from ahn.layout.rotation import Rotation
from ahn.memory.share import WHOLE, Share
from ahn.model.observer import Observer
from ahn.wrappers import attached


@dataclasses.dataclass(eq=False)
class Adapter:
    """What `attach` did to a model and `detach` undoes."""

    kernel: str
    """The base model's own attention implementation."""
    handles: list[RemovableHandle]
    rotation: Rotation | None = None
    """How the base turns keys by their positions; None where that cannot be repeated."""
    trained: int | None = None
    """Positions that the base was trained on; None if it does not say, or once it was said that a text is longer."""
    steady: int | None = None
    """Tokens up to which the base turns keys by one set of angles; see `ahn.model.positions.steady_up_to`."""
    share: Share = WHOLE
    """Which of the model's heads this process holds."""
    recurrent_base: bool = False
    """Layers of the base keep a recurrent state, alone or beside their attention."""
    counts_anew: bool = False
    """The decoder numbers the tokens of every forward from 0 where nobody says their positions."""
    makes_masks: bool = False
    """What is around the decoder decides who sees whom, as in some models that see images."""
    measured: dict[str, Any] | None = None
    """What the memory's training measured at its end, for a card."""
    compiled: CompiledParts = dataclasses.field(default_factory=CompiledParts)

    @property
    def enabled(self) -> bool:
        """Whether this thread is outside of `disabled`."""
        return not any(adapter is self for adapter in _disabled.get())

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Those of this thread, asked in this order. While there are any, no step is captured or replayed."""
        return tuple(observer for adapter, observer in _observers.get() if adapter is self)


# Never restored by a token: a block may be left in another context than it was entered in (generators, fixtures).
_disabled: ContextVar[tuple[Adapter, ...]] = ContextVar("ahn_disabled", default=())
_observers: ContextVar[tuple[tuple[Adapter, Observer], ...]] = ContextVar("ahn_observers", default=())


@contextlib.contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model is the base model, bit for bit, with full attention: the teacher.

    That holds for the thread that is in the block. Others keep the memory, also those that are started inside it: they
    need a block of their own, or `contextvars.copy_context().run`.
    """
    adapter: Adapter = attached(model)._ahn
    _disabled.set((*_disabled.get(), adapter))
    try:
        yield
    finally:
        _disabled.set(_without(_disabled.get(), adapter))


@contextlib.contextmanager
def observed(model: PreTrainedModel, observer: Observer, first: bool) -> Iterator[None]:
    """Inside the block `observer` is asked about every forward of this thread, before all others or after them."""
    entry = attached(model)._ahn, observer
    entry[0].share.check_whole("Looking into a memory", "load the model without tp_plan for it")
    before = _observers.get()
    _observers.set((entry, *before) if first else (*before, entry))
    try:
        yield
    finally:
        _observers.set(tuple(other for other in _observers.get() if other is not entry))


def _without(adapters: tuple[Adapter, ...], adapter: Adapter) -> tuple[Adapter, ...]:
    """The adapters with one entry of this one less: blocks nest."""
    for place, other in reversed(list(enumerate(adapters))):
        if other is adapter:
            return (*adapters[:place], *adapters[place + 1 :])
    return adapters

"""The two recurrences that all memories are made of, and the one place that chooses how they are computed.

`delta_rule` (DeltaNet, Gated DeltaNet) and `decay_rule` (Mamba2); shapes and equations are in `reference`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ahn.errors import AHNError
from ahn.ops import chunked, reference

__all__ = ["BACKENDS", "decay_rule", "delta_rule", "use_backend"]

BACKENDS = ("reference", "chunked", "fla")
_forced: ContextVar[str | None] = ContextVar("ahn_ops_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one of `BACKENDS` inside the block (None: choose by device and length again)."""
    if name is not None and name not in BACKENDS:
        raise AHNError(f"Unknown ops backend {name!r}; choose from {', '.join(BACKENDS)}.")
    if name == "fla" and not _has_fla():
        raise AHNError("The fla backend needs the package fla-core: pip install 'ahn[cuda]'.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None


@cache
def _gated_backward_is_wrong() -> bool:
    """Triton 3.4 to 3.7.0 miscompile the gated chunk backward on Hopper; fla refuses to run it there."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    return (3, 4, 0) <= version <= (3, 7, 0) and torch.cuda.get_device_capability()[0] == 9


def _choose(q: Tensor, state: Tensor, gated: bool) -> ModuleType:
    name = _forced.get()
    if name is None:
        if q.shape[2] == 1:
            name = "reference"  # one step is already its plainest form
        elif q.is_cuda and _has_fla() and not (gated and torch.is_grad_enabled() and _gated_backward_is_wrong()):
            name = "fla"
        else:
            name = "chunked"
    if name == "fla":
        from ahn.ops import fla

        return fla
    return chunked if name == "chunked" else reference


def _promote(state: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """Everything in the state's precision: float32, or float64 when a test asks for it."""
    return [None if x is None else x.to(state.dtype) for x in inputs]


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule over N tokens; see `reference.delta_rule`."""
    backend = _choose(q, state, gated=decay is not None)
    return backend.delta_rule(*_promote(state, q, k, v, beta, decay), state)


def decay_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The decaying sum of outer products over N tokens; see `reference.decay_rule`."""
    backend = _choose(q, state, gated=True)
    return backend.decay_rule(*_promote(state, q, k, v, decay), state)

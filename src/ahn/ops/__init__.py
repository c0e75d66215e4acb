"""The two recurrences that all memories are made of, and the one place that chooses how they are computed.

`delta_rule` (DeltaNet, Gated DeltaNet) and `decay_rule` (Mamba2); shapes and equations are in `reference`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ahn.errors import AHNError
from ahn.ops import chunked, reference
from ahn.ops.step import StepRead, StepRule

__all__ = [
    "BACKENDS",
    "decay_rule",
    "default_backend",
    "delta_rule",
    "has_triton",
    "scan",
    "scans_whole",
    "use_backend",
]

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
def has_triton() -> bool:
    """Whether our kernels can run: with Triton (torch brings it along on Linux) and a C compiler that it calls."""
    compilers = (os.environ.get("CC", ""), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(name) for name in compilers)


@cache
def _gated_backward_is_wrong() -> bool:
    """Triton 3.4 to 3.7.0 miscompile the gated chunk backward on Hopper; fla refuses to run it there."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    return (3, 4, 0) <= version <= (3, 7, 0) and torch.cuda.get_device_capability()[0] == 9


def default_backend(device: torch.device, gated: bool = True, needs_grad: bool = False) -> str:
    """Which of `BACKENDS` long scans use on this device when none is forced."""
    if device.type != "cuda" or not _has_fla():
        return "chunked"
    return "chunked" if gated and needs_grad and _gated_backward_is_wrong() else "fla"


def _choose(tensors: tuple[Tensor, ...], gated: bool) -> ModuleType:
    """The implementation for these inputs, q (B, H, N, P) first."""
    q = tensors[0]
    name = _forced.get()
    if name is None:
        if q.shape[2] == 1:
            name = "reference"  # one step is already its plainest form
        elif not 16 <= q.shape[3] <= 256:
            name = "chunked"  # smaller than a tensor core's tile, or beyond what fla's kernels hold in registers
        else:
            needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            name = default_backend(q.device, gated, needs_grad)
    if name == "fla":
        from ahn.ops import fla

        return fla
    return chunked if name == "chunked" else reference


def scans_whole(query: Tensor) -> bool:
    """Whether `scan` can do this: it has no gradient, and wants half precision on a GPU.

    Args:
        query: (B, Hq, m, P).
    """
    P = query.shape[-1]
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and 16 <= P <= 128 and P & (P - 1) == 0
    return fits and _forced.get() is None and not torch.is_grad_enabled() and has_triton()


def scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    decay: Tensor | None,
    state: Tensor,
    rule: StepRule,
    read: StepRead | None,
) -> tuple[Tensor, Tensor]:
    """A memory's whole work on many tokens, in kernels; see `scan_triton.scan`."""
    from ahn.ops import scan_triton

    with torch.cuda.device(query.device):
        return scan_triton.scan(query.to(key.dtype), key, value, write, decay, state, rule, read)


def _in_full_precision(device: torch.device) -> torch.autocast:
    """Autocast would run the matrix products of a recurrence in bfloat16 and lose the state's precision."""
    return torch.autocast(device.type, enabled=False)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule over N tokens in the state's precision; see `reference.delta_rule`."""
    q, k, v, beta = (x.to(state.dtype) for x in (q, k, v, beta))
    decay = None if decay is None else decay.to(state.dtype)
    with _in_full_precision(q.device):
        return _choose((q, k, v, beta, state), gated=decay is not None).delta_rule(q, k, v, beta, decay, state)


def decay_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The decaying sum of outer products over N tokens in the state's precision; see `reference.decay_rule`."""
    q, k, v, decay = (x.to(state.dtype) for x in (q, k, v, decay))
    with _in_full_precision(q.device):
        return _choose((q, k, v, decay, state), gated=True).decay_rule(q, k, v, decay, state)

"""Which implementation of a recurrence runs, and whether kernels can: decided in one place."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from ahn.errors import AHNError

BACKENDS = ("reference", "chunked")
# Of the whole process: under checkpointing layers run again in the backward pass, which on a GPU has its own threads.
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one of `BACKENDS` inside the block, in all threads (None: choose by device, type and length again)."""
    global _forced
    if name is not None and name not in BACKENDS:
        raise AHNError(f"Unknown ops backend {name!r}; choose from {', '.join(BACKENDS)}.")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that `use_backend` forces, if any."""
    return _forced


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program of a kernel can have; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types lack the field
    return properties.shared_memory_per_block_optin


@cache
def multiprocessors(device: torch.device) -> int:
    """Of this GPU; of an H100 where kernels are interpreted, so that they share their work out as there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def has_triton() -> bool:
    """Whether our kernels can run: with Triton (torch brings it along on Linux) and a C compiler that it calls."""
    compilers = (os.environ.get("CC", ""), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(name) for name in compilers)

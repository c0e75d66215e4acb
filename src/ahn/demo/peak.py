"""Peak memory of a piece of work, as far as the platform lets it be measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5): sets VmHWM, the peak of the resident set, to the resident set of now
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
EXACT = {M_MMAP_THRESHOLD: 1 << 20}
"""Allocator settings in bytes under which large tensors go back to the system when freed. Smaller costs much time."""
USUAL = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
"""Where glibc's own adaptation of these settings ends in a program that allocates large tensors."""


class Peak:
    """`bytes` is set when the block of `measure` ends: the peak above what was held before, None if it is unknown."""

    bytes: int | None = None


@contextlib.contextmanager
def exact_allocator() -> Iterator[None]:
    """In the block the C library keeps no large tensor back that was freed; it is slower so.

    Otherwise what was freed before would hide what a piece of work takes, and the same work would measure differently
    every time. For that reason work to be measured should come before other work.
    """
    _set_allocator(EXACT)
    try:
        yield
    finally:
        _set_allocator(USUAL)


@contextlib.contextmanager
def measure(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block: of the GPU if `device` is one, else of this process.

    The latter is for Linux, inside `exact_allocator`.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    resident = _reset_process_peak() if device.type == "cpu" else None
    yield peak
    if resident is not None:
        peak.bytes = max(0, _status("VmHWM") - resident)


def _reset_process_peak() -> int | None:
    """Start a new peak; returns the resident bytes of now, None where this cannot be done."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text(RESET_PEAK)
        return _status("VmRSS")
    except (AttributeError, OSError, TypeError, ValueError):
        return None


def _set_allocator(settings: dict[int, int]) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        for name, value in settings.items():
            ctypes.CDLL(None).mallopt(name, value)


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"no {field} in {STATUS}")

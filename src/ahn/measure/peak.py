"""Peak memory of a piece of work, as far as the platform lets it be measured."""

import contextlib
import ctypes
import dataclasses
import gc
import sys
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


@dataclasses.dataclass
class Peak:
    """Of a block of `measure`, in bytes, set when it ends. None where the platform cannot tell.

    Attributes:
        growth: the peak above what was held before.
        total: the peak with what was held before.
        reserved: the most that torch's allocator had taken from the GPU, captured graphs and gaps included.
    """

    growth: int | None = None
    total: int | None = None
    reserved: int | None = None


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
def measure(device: torch.device, held: int = 0) -> Iterator[Peak]:
    """Measure the peak memory of the block: of the GPU if `device` is one, else of this process.

    The latter is for Linux, inside `exact_allocator`.

    Args:
        held: bytes of weights and caches that exist already. A GPU knows by itself; on a CPU, where only the growth of
            the process can be seen, they are added to it for `Peak.total`.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.total, peak.reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        peak.growth = peak.total - before
        return
    resident = _reset_process_peak() if device.type == "cpu" else None
    yield peak
    if resident is not None:
        peak.growth = max(0, _status("VmHWM") - resident)
        peak.total = held + peak.growth


def so_far() -> int:
    """Bytes: the most that this process has ever held on its GPU, or without one at all."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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

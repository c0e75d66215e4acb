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
M_MMAP_THRESHOLD = -3  # mallopt(3)
MAPPED = 64 << 10  # bytes


class Peak:
    """`bytes` is set when the block of `measure` ends: the peak above what was held before, None if it is unknown."""

    bytes: int | None = None


@contextlib.contextmanager
def measure(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block: of the GPU if `device` is one, else of this process (Linux with glibc).

    On a CPU it leaves the allocator set so that large tensors go back to the system when they are freed; otherwise
    what was freed before would hide what the block takes, and the same work would measure differently every time.
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
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        libc.malloc_trim(0)
        CLEAR.write_text(RESET_PEAK)
        return _status("VmRSS")
    except (AttributeError, OSError, TypeError, ValueError):
        return None


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"no {field} in {STATUS}")

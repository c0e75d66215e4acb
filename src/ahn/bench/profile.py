"""Which kernels a piece of work spends its time in, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch.profiler import ProfilerActivity, profile

from ahn.bench.clock import seconds

LISTED = 60
"""Kernels that are listed; the others are summed."""


class Kernel(TypedDict):
    """Milliseconds of all calls of one kernel (on a CPU: of one operator, without those that it calls)."""

    name: str
    ms: float
    calls: int


def kernels(device: torch.device, work: Callable[[], Any]) -> list[Kernel]:
    """Kernels of one more run of the work, longest first. Their total says how busy the device was."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as found:
        seconds(device, work)
    times = [
        Kernel(
            name=event.key,
            ms=(event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3,
            calls=event.count,
        )
        for event in found.key_averages()
    ]
    times = sorted((kernel for kernel in times if kernel["ms"] > 0), key=lambda kernel: -kernel["ms"])
    rest = times[LISTED:]
    if rest:
        total, calls = sum(kernel["ms"] for kernel in rest), sum(kernel["calls"] for kernel in rest)
        times = [*times[:LISTED], Kernel(name=f"{len(rest)} others", ms=total, calls=calls)]
    return times


def table(times: list[Kernel], seconds: float) -> str:
    """One kernel a line, with its share of the time that the work takes without a profiler."""
    busy = sum(kernel["ms"] for kernel in times)
    lines = [f"{1e3 * seconds:.1f} ms measured without the profiler, {busy:.1f} ms in kernels"]
    lines += [
        f"{kernel['ms']:10.3f} ms {100 * kernel['ms'] / (1e3 * seconds):5.1f} % {kernel['calls']:6d} x "
        f"{1e3 * kernel['ms'] / kernel['calls']:10.1f} us  {kernel['name'][:150]}"
        for kernel in times
    ]
    return "\n".join(lines) + "\n"

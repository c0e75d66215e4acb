"""Which kernels a piece of work spends its time in, by torch's profiler."""

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ahn.measure.clock import seconds

LISTED = 60
"""Kernels that are listed; the others are summed."""


class Kernel(TypedDict):
    """All calls of one kernel, in milliseconds (on a CPU: of one operator, without those that it calls).

    `ms` is how long they ran; `adds_ms` the part of it in which none that had begun earlier was still running: what
    they add to the whole, which kernels that overlap share.
    """

    name: str
    ms: float
    adds_ms: float
    calls: int


def kernels(device: torch.device, work: Callable[[], Any]) -> list[Kernel]:
    """Kernels of one more run of the work, what adds most first. What all add is how long the device was busy."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as found:
        seconds(device, work)
    if gpu:
        events = [event for event in found.events() or [] if event.device_type == DeviceType.CUDA]
        times = summed([(event.name, event.time_range.start, event.time_range.end) for event in events])
    else:
        times = [
            Kernel(name=e.key, ms=e.self_cpu_time_total / 1e3, adds_ms=e.self_cpu_time_total / 1e3, calls=e.count)
            for e in found.key_averages()
        ]
    times = sorted((kernel for kernel in times if kernel["ms"] > 0), key=lambda kernel: -kernel["adds_ms"])
    rest = times[LISTED:]
    if rest:
        ms, adds = (sum(kernel[part] for kernel in rest) for part in ("ms", "adds_ms"))
        calls = sum(kernel["calls"] for kernel in rest)
        times = [*times[:LISTED], Kernel(name=f"{len(rest)} others", ms=ms, adds_ms=adds, calls=calls)]
    return times


def summed(ran: list[tuple[str, float, float]]) -> list[Kernel]:
    """By name, what ran from when to when, in microseconds."""
    found: dict[str, Kernel] = {}
    until = 0.0
    for name, start, end in sorted(ran, key=lambda x: x[1:]):
        kernel = found.setdefault(name, Kernel(name=name, ms=0.0, adds_ms=0.0, calls=0))
        kernel["ms"] += (end - start) / 1e3
        kernel["adds_ms"] += max(0.0, end - max(start, until)) / 1e3
        kernel["calls"] += 1
        until = max(until, end)
    return list(found.values())


def table(times: list[Kernel], seconds: float) -> str:
    """One kernel per line, with its share of the time that the work takes without a profiler."""
    busy = sum(kernel["adds_ms"] for kernel in times)
    lines = [
        f"{1e3 * seconds:.2f} ms measured without the profiler, {busy:.2f} ms in kernels",
        "   adds ms   share   calls    ms in all   us a call",
    ]
    lines += [
        f"{kernel['adds_ms']:10.3f} {100 * kernel['adds_ms'] / (1e3 * seconds):6.1f}% {kernel['calls']:7d} "
        f"{kernel['ms']:12.3f} {1e3 * kernel['ms'] / kernel['calls']:11.2f}   {kernel['name'][:150]}"
        for kernel in times
    ]
    return "\n".join(lines) + "\n"

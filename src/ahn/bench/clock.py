"""Clocks and peaks: what is asynchronous is waited for, what is compiled at the first call stays out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ahn.demo import peak


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Time of a piece of work from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def repeated(device: torch.device, work: Callable[[], Any], times: int, budget: float) -> list[float]:
    """Times in seconds of up to `times` repetitions; no new one begins after `budget` seconds. At least one."""
    found: list[float] = []
    while not found or (len(found) < times and sum(found) < budget):
        found.append(seconds(device, work))
    return found


def median(times: list[float]) -> float:
    """The middle one: one disturbed repetition does not move it."""
    return statistics.median(times)


def spread(times: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(times) - min(times)) / median(times)


def release(device: torch.device) -> None:
    """Give memory of a GPU back that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@dataclasses.dataclass
class Memory:
    """Of a block of `peak_memory`, set when it ends. None where the platform cannot tell.

    Attributes:
        peak_bytes: most bytes of tensors that lived at one time, those from before the block included.
        reserved_bytes: most bytes that torch's allocator had taken from the GPU, captured graphs and gaps included.
    """

    peak_bytes: int | None = None
    reserved_bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device, held: int) -> Iterator[Memory]:
    """Measure the peak of the block.

    Args:
        held: bytes of weights and caches that exist already. A GPU knows by itself; on a CPU, where only the growth of
            the process can be seen, they are added to it.
    """
    found = Memory()
    with peak.measure(device) as growth:
        yield found
    if device.type == "cuda":
        found.peak_bytes = torch.cuda.max_memory_allocated(device)
        found.reserved_bytes = torch.cuda.max_memory_reserved(device)
    elif growth.bytes is not None:
        found.peak_bytes = held + growth.bytes


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Bytes of some tensors; one that appears twice counts once."""
    return sum({id(x): x.nbytes for x in tensors}.values())

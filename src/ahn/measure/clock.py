"""Clocks: what is asynchronous is waited for, what is compiled at the first call stays out."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


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


def spread(times: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(times) - min(times)) / statistics.median(times)


def release(device: torch.device) -> None:
    """Give memory of a GPU back that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Bytes of some tensors; one that appears twice counts once."""
    return sum({id(x): x.nbytes for x in tensors}.values())

"""How fast this machine copies and multiplies today: the two rates that a roofline is made of."""

import dataclasses
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from ahn.measure.clock import repeated, synchronize

REPEATS = 15
BLOCK = 10
"""Calls on a GPU that are timed at once: one alone would be timed together with its launch and the wait for its end."""
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates, with the raw times in seconds.

    Attributes:
        bytes_per_second: of a copy in the device's memory, bytes read plus bytes written.
        flops_per_second: of a square matrix product in the model's dtype on random numbers.
    """

    bytes_per_second: float
    flops_per_second: float
    copied_bytes: int
    copy_times: list[float]
    matmul_size: int
    matmul_dtype: str
    matmul_times: list[float]
    clocks: dict[str, str]
    """What the driver said in the middle of the matrix products."""


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both; takes about a second, and 3 GB on a GPU."""
    gpu = device.type == "cuda"
    copied, size = (1 << 30, 8192) if gpu else (1 << 26, 1024)
    copy_times = _copy(device, copied)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmul_times = _times(device, lambda: torch.matmul(a, b, out=out))
    clocks = {}
    if gpu:
        for _ in range(600):  # about a second of work, still running while the driver is asked
            torch.matmul(a, b, out=out)
        clocks = query(device, CLOCKS)
        synchronize(device)
    return Ceilings(
        bytes_per_second=2 * copied / statistics.median(copy_times),
        flops_per_second=2 * size**3 / statistics.median(matmul_times),
        copied_bytes=copied,
        copy_times=copy_times,
        matmul_size=size,
        matmul_dtype=str(dtype).removeprefix("torch."),
        matmul_times=matmul_times,
        clocks=clocks,
    )


def _copy(device: torch.device, size: int) -> list[float]:
    source = torch.randint(256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return _times(device, lambda: target.copy_(source))


def _times(device: torch.device, call: Callable[[], Any]) -> list[float]:
    """Seconds of a call, after one that warms up."""
    calls = BLOCK if device.type == "cuda" else 1

    def block() -> None:
        for _ in range(calls):
            call()

    call()
    return [seconds / calls for seconds in repeated(device, block, REPEATS, budget=2)]


def query(device: torch.device, fields: tuple[str, ...]) -> dict[str, Any]:
    """What nvidia-smi says about the GPU, with its units; empty where there is no nvidia-smi."""
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader", f"--query-gpu={','.join(fields)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in answer.stdout.split(",")), strict=False))

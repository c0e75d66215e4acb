"""Time and peak memory of a memory's scan, forward and with gradients: our kernels and the chunked form in torch.

    python benchmarks/scan.py --out scan.jsonl          # a GPU: layers of Qwen2.5-7B and -3B, and of a small model
    python benchmarks/scan.py --smoke                   # a CPU, seconds: that the script runs

`raw` is the recurrence alone, from keys and values as the model has them and given gates; `finished` goes on through
norm, output gate and the projection of each head. One JSON line a measurement, machine and versions in the first.
Peaks are bytes alive in torch's allocator beyond the inputs, gradients of all inputs included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ahn import memory
from ahn.bench.records import code, hardware
from ahn.cli.env import environment
from ahn.memory import RecurrentMemory
from ahn.ops.rule import StepRead
from ahn.ops.scan import write_and_read

SHAPES = {  # B, Hq, Hkv, P, m
    "qwen2.5-7b": (1, 28, 4, 128, 16384),
    "qwen2.5-3b": (1, 16, 2, 128, 16384),
    "small": (8, 8, 2, 64, 7680),
}
KINDS = ("gated_deltanet", "deltanet", "mamba2")


def made(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Random inputs of ordinary size, in bfloat16 where a bfloat16 model has them so."""
    B, HEADS, HKV, P, m = shape
    r = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=r, device=device)

    return {
        "query": normal(B, HEADS, m, P).bfloat16(),
        "key": normal(B, HKV, m, P).bfloat16(),
        "value": normal(B, HKV, m, P).bfloat16(),
        "write": torch.sigmoid(normal(B, HEADS, m)),
        "decay": -0.1 * torch.rand(B, HEADS, m, generator=r, device=device),
        "state": 0.1 * normal(B, HEADS, P, P),
        "x": normal(B, m, 1).bfloat16(),
    }


def scan(
    module: RecurrentMemory, implementation: str, finished: bool, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Read (B, Hq, m, P) and state, as the model's attention calls it."""
    query, key, value, write, decay, state, x = given.values()
    rule = module.step_rule()
    if implementation == "kernels":
        from ahn.ops.scan.gradients import Scan

        arguments = (query, key, value, write, decay if rule.decay else None, state, rule)
        if not finished:
            return Scan.apply(*arguments)
        read = StepRead(query, module.read_gate(x).float(), None, module.step_norm, module.o_proj.weight)
        return write_and_read(*arguments, read)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    gates = {rule.write: write} | ({rule.decay: decay} if rule.decay else {})
    o, new = module.scan(query, key, value, gates, {"state": state})
    return module.read_out(o, x).to(query.dtype) if finished else o, new["state"]


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(
    module: RecurrentMemory,
    implementation: str,
    finished: bool,
    gradients: bool,
    given: dict[str, Tensor],
    repeats: int,
) -> dict[str, Any]:
    """Times and peak of one way to do one thing, after calls that compile and warm up."""
    device = given["query"].device
    leaves = {name: x.detach().requires_grad_(gradients) for name, x in given.items()}
    weight = torch.ones((), device=device).expand(given["query"].shape)

    def work() -> None:
        with torch.set_grad_enabled(gradients):
            o, state = scan(module, implementation, finished, leaves)
            if gradients:
                torch.autograd.backward((o, state), (weight.to(o.dtype), torch.ones_like(state)))
        for x in (*leaves.values(), *module.parameters()):
            x.grad = None

    first, peak = seconds(work, device), None
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        peak = torch.cuda.max_memory_allocated(device) - held
    times = [seconds(work, device) for _ in range(repeats)]
    return {"first_s": first, "median_s": statistics.median(times), "times_s": times, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, as always without a GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                print(json.dumps(row), file=file)

    write({"hardware": hardware(device), "environment": environment(), "code": code()})
    shapes = {"smoke": (1, 4, 2, 16, 130)} if options.smoke or device.type != "cuda" else SHAPES
    implementations = ("chunked", "kernels") if device.type == "cuda" else ("chunked",)
    for (name, shape), kind in itertools.product(shapes.items(), KINDS):
        given, module = made(shape, device), memory.get(kind)(1, shape[1], shape[3]).to(device)
        torch.nn.init.normal_(module.o_proj.weight, std=0.1)  # a new one's are zero
        for finished, implementation, gradients in itertools.product((False, True), implementations, (False, True)):
            row = {"shape": name, "B_Hq_Hkv_P_m": shape, "memory": kind, "implementation": implementation}
            row |= {"read": "finished" if finished else "raw", "pass": "forward+backward" if gradients else "forward"}
            write(row | measure(module, implementation, finished, gradients, given, options.repeats))


if __name__ == "__main__":
    main()

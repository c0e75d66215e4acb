"""Speed of `ahn.attend.spans.attend` and its gradient, beside torch's attention (causal, full) and FlexAttention.

    python benchmarks/attention.py --out DIR      # on a GPU; rows go to DIR/rows.jsonl
    python benchmarks/attention.py --smoke        # tiny, anywhere: does it run

TFLOP/s count pairs of a query and a key that it sees: 4·P a pair and head forward, 2.5 times that backward. Times are
medians by CUDA events. Torch's kernels get keys and values already repeated for the query heads.
"""

from __future__ import annotations

import argparse
import functools
import signal
import statistics
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ahn.attend import spans
from ahn.bench import records
from ahn.cli.env import environment
from ahn.layout.visibility import FOR_EVER
from ahn.measure.clock import repeated

Shape = namedtuple("Shape", "P Hq Hkv B L window sinks")


LONG, SMALL = (1, 24576, 8064, 128), Shape(16, 2, 1, 1, 64, 20, 4)
SHAPES = (Shape(128, 28, 4, *LONG), Shape(128, 16, 2, *LONG), Shape(64, 8, 2, 8, 8192, 480, 32))
MOST_SECONDS = 240  # for one row, compiling included
REPEATS = 15
WAYS = ("forward", "backward")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def milliseconds(work: Callable[[], Any], cuda: bool) -> list[float]:
    """Of each repetition, after some that do not count."""
    if not cuda:
        return [1000 * x for x in repeated(torch.device("cpu"), work, REPEATS, 10)]
    times = []
    for _ in range(3):
        work()
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def methods(shape: Shape, device: str) -> dict[str, tuple[Attend, int]]:
    """By name: attention, and the pairs that one of its heads sees in one batch."""
    L, scaling = shape.L, shape.P**-0.5
    row = torch.arange(L, device=device)
    until = torch.where(row < shape.sinks, FOR_EVER, row + shape.window).int()[None, None]
    size = (shape.B, shape.Hkv, L)
    lives = torch.randint(1, 2 * shape.window, size, device=device, dtype=torch.int32)
    random = row.int() + lives

    def pairs(until: Tensor) -> int:
        return int((until.clamp_max(L) - row).expand(size).sum())

    def torchs(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)

    found: dict[str, tuple[Attend, int]] = {
        "spans": (lambda q, k, v: spans.attend(q, k, v, until, scaling), pairs(until)),
        "spans random": (lambda q, k, v: spans.attend(q, k, v, random, scaling), pairs(random)),
    }
    full = shape.B * shape.Hkv * L * (L + 1) // 2
    if device == "cuda":
        ever = torch.full_like(until, FOR_EVER)
        found["spans full"] = (lambda q, k, v: spans.attend(q, k, v, ever, scaling), full)
        found["cudnn full"] = (functools.partial(torchs, SDPBackend.CUDNN_ATTENTION), full)
        found["flash full"] = (functools.partial(torchs, SDPBackend.FLASH_ATTENTION), full)

        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & ((k < shape.sinks) | (k > q - shape.window))

        block_mask = create_block_mask(mask, None, None, L, L, device=device)
        flex = torch.compile(flex_attention, dynamic=False)
        flex = functools.partial(flex, block_mask=block_mask, scale=scaling, enable_gqa=True)
        found["flex"] = (flex, pairs(until))
    return found


def measure(shape: Shape, name: str, attend: Attend, pairs: int, device: str) -> records.Row:
    """One row."""
    cuda = device == "cuda"
    heads = shape.Hq if name.endswith(" full") and not name.startswith("spans") else shape.Hkv
    sizes = [(shape.B, shape.L, h, shape.P) for h in (shape.Hq, heads, heads)]
    dtype = torch.bfloat16 if cuda else torch.float32
    q, k, v = (torch.randn(s, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for s in sizes)
    out = attend(q, k, v)
    gradient = torch.randn_like(out)
    forward = milliseconds(lambda: attend(q, k, v), cuda)
    backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), cuda)
    flops = 4 * shape.P * pairs * (shape.Hq // shape.Hkv)
    rates = {
        "forward": flops / statistics.median(forward) / 1e9,
        "backward": 2.5 * flops / statistics.median(backward) / 1e9,
    }
    return {"forward_ms": forward, "backward_ms": backward, **{f"{n}_tflops": x for n, x in rates.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log = None
    if options.out:
        log = records.Log(options.out, environment() | records.hardware(torch.device(device)) | records.code())
    signal.signal(signal.SIGALRM, too_long)
    torch._functorch.config.donated_buffer = False  # FlexAttention's backward pass is repeated on one graph
    for shape in (SMALL,) if options.smoke else SHAPES:
        print(shape, flush=True)
        for name, (attend, pairs) in methods(shape, device).items():
            signal.alarm(MOST_SECONDS)
            try:
                row = measure(shape, name, attend, pairs, device)
            except Exception as error:  # a kernel that this machine lacks is a row, not a crash
                row = {"error": f"{type(error).__name__}: {error}"[:300]}
            signal.alarm(0)
            if log is not None:
                log.write({**shape._asdict(), "method": name, **row})
            for way in WAYS if "error" not in row else ():
                row[way] = f"{way} {statistics.median(row[way + '_ms']):8.3f} ms {row[way + '_tflops']:6.1f} TFLOP/s"
            print(f"  {name:18}", row.get("error") or "   ".join(row[way] for way in WAYS), flush=True)


def too_long(*_: Any) -> None:
    raise TimeoutError(f"over {MOST_SECONDS} s")


if __name__ == "__main__":
    main()

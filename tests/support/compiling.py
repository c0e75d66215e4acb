"""Compile what a layer's training step runs for a GPU that is not there: `python -m support.compiling 89 101376`.

The arguments are a compute capability and the shared memory of one program in bytes. A line of JSON says of each kernel
how much it wants. In a process of its own: elsewhere on a CPU Triton interprets.
"""

from __future__ import annotations

import contextlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from support.kernels import RULES


def layer(attention: Any, scan: Any, P: int) -> None:
    """Attention and memory of one layer with 4 query heads and 2 key heads of P, forth and back."""
    from ahn.ops.rule import StepRead

    B, Hq, Hkv, n, left, sinks = 1, 4, 2, 300, 200, 4
    rule = RULES["gated_deltanet"]
    query, key, value = (torch.randn(B, n, h, P, dtype=torch.bfloat16).transpose(1, 2) for h in (Hq, Hkv, Hkv))
    columns = attention.Columns((torch.arange(n, dtype=torch.int32) + n - left - sinks)[None, None], n)
    (q, of_query), (k, of_key), (v, of_value) = (
        attention.WithPart.apply(x.requires_grad_(), first, first + left)
        for x, first in ((query, n - left), (key, sinks), (value, sinks))
    )
    exact = attention.attend(q, k, v, columns, P**-0.5).transpose(1, 2)
    gates = torch.rand(B, Hq, left), -torch.rand(B, Hq, left), torch.randn(B, Hq, left)
    write, decay, gamma, norm, o_proj = (x.requires_grad_() for x in (*gates, torch.ones(P), torch.randn(Hq, P, P)))
    read, state = StepRead(of_query, gamma, None, norm, o_proj), torch.zeros(B, Hq, P, P)
    out, _ = scan.write_and_read(of_query, of_key, of_value, write, decay, state, rule, read, exact)
    out.sum().backward()


def main(capability: int, shared_memory: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from ahn.attend import spans, spans_blocks
    from ahn.ops import scan
    from ahn.ops.scan import gradients

    wanted: dict[str, int] = {}
    run = triton.runtime.JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **settings)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        wanted[self.fn.__name__] = kernel.metadata.shared
        return kernel

    triton.runtime.JITFunction.run = compiled
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    spans_blocks.shared_memory = gradients.shared_memory = lambda device: shared_memory
    spans.supported = lambda query: True
    torch.cuda.device = lambda device: contextlib.nullcontext()
    layer(spans, scan, P=128)
    print(json.dumps(wanted))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Compile what a layer's training step and a captured step of several tokens run, for a GPU that is not there.

    python -m support.compiling 89 101376

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


@torch.no_grad()
def several_tokens(P: int) -> None:
    """A captured step of 8 tokens, of 16 and of 64, with every kind of memory, and what settles them."""
    from ahn.layout.state import LayerState, WindowState
    from ahn.ops.gate import Gate
    from ahn.ops.routes import Routes
    from ahn.ops.rule import StepRead
    from ahn.ops.step import several_kernel
    from ahn.ops.step.reference import StepRotation, by_steps

    Hq, Hkv, S, W, G = 16, 2, 4, 300, 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    cases = ("gated_deltanet", 8, 1), ("gated_deltanet", 16, 1), ("gated_deltanet", 64, 1), ("deltanet", 8, 2)
    for name, N, states in (*cases, ("mamba2", 8, 1), ("window_only", 8, 1)):
        rule = RULES[name]
        writers = Hq if states == 1 else Hkv
        names = [] if rule is None else [gate for gate in (rule.write, rule.decay) if gate]
        window, beside = (
            WindowState(normal(1, Hkv, T, P), normal(1, Hkv, T, P), {gate: normal(1, writers, T) for gate in names})
            for T in (S + W, G)
        )
        state = LayerState(window, None, {"state": torch.zeros(1, writers * states, P, P)}, None, beside)
        finish = routes = None
        if rule is not None:
            norm, weight = torch.ones(Hq * P if rule.across_heads else P), torch.rand(1, Hq, N)
            sizes = (Hq, P, P), (Hkv, P, P), (Hq, P, states), (Hkv, P, states)
            routes = Routes(*(normal(*size) for size in sizes)) if states > 1 else None
            finish = StepRead(normal(1, Hq, N, P), normal(1, N, Hq).mT, weight, norm, normal(Hq, P, P), routes)
        new = normal(1, Hq, N, P), normal(1, Hkv, N, P), normal(1, Hkv, N, P)
        counts = torch.tensor([400]), torch.tensor([0])
        decay = Gate(normal(1, N, writers).mT, "softplus", normal(writers), normal(writers))
        gates = {gate: decay if gate == "decay" else Gate(normal(1, N, writers).mT, "sigmoid") for gate in names}
        rotation = None
        if by_steps(N, routes is not None):
            rotation = StepRotation(normal(1, 1, N, P), normal(1, 1, N, P), normal(P), normal(P), 1e-6, 1e-6)
        several_kernel.read(*new, gates, *counts, state, S, P**-0.5, rule, finish, rotation)
        several_kernel.settle(*counts, state, S, rule, routes)


def several_products(K: int) -> None:
    """What stands around attention in a step of 8 tokens, in half and in full precision."""
    from ahn.ops.step import few_vectors_kernel

    for dtype in (torch.bfloat16, torch.float32):
        x, bias, weight, wide = (torch.randn(shape, dtype=dtype) for shape in ((8, K), (K,), (K, K), (K, 4 * K)))
        few_vectors_kernel.products(x, [weight, weight], [bias, None], False)
        few_vectors_kernel.products(x, [weight, weight], [None, None], True)
        few_vectors_kernel.partial_products(torch.randn(8, 4 * K, dtype=dtype), wide, 4)
        few_vectors_kernel.sum_and_norm(x, torch.randn(4, 8, K), bias, bias, 1e-6)
        few_vectors_kernel.sum_and_norm(x, None, None, bias, 1e-6)


def main(capability: int, shared_memory: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from ahn.attend import spans, spans_blocks
    from ahn.ops import scan
    from ahn.ops.scan import gradients
    from ahn.ops.step import dependent_launch

    wanted: dict[str, int] = {}
    run = triton.runtime.JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **settings)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        wanted[self.fn.__name__] = max(kernel.metadata.shared, wanted.get(self.fn.__name__, 0))
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
    if capability >= 90:
        dependent_launch.options = lambda x: {"PDL": True, "launch_pdl": True}
    layer(spans, scan, P=128)
    several_tokens(P=128)
    several_products(K=1024)
    print(json.dumps(wanted))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

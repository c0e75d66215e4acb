"""On a GPU: bfloat16 heads multiply into float32, and memory stays bounded."""

from __future__ import annotations

import pytest
import torch

from ahn.ops import has_triton
from ahn.training.losses import Head, hidden_losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_bfloat16_equals_float32_on_the_same_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 300, 64, generator=g).bfloat16()
    hidden = (teacher + 0.2 * torch.randn(1, 300, 64, generator=g)).bfloat16()
    weight, targets = torch.randn(500, 64, generator=g).bfloat16(), torch.randint(500, (1, 300), generator=g)
    positions = torch.arange(300)[None] >= 40
    found = []
    for device in ("cpu", "cuda"):
        leaf = hidden.detach().clone().to(device).requires_grad_()
        losses = hidden_losses(
            leaf, teacher.to(device), targets, positions, Head(weight.to(device)), 1.0, 1.0, chunk=64
        )
        losses.loss.backward()
        found.append((torch.stack(losses).detach().cpu(), leaf.grad))
    (cpu, cpu_grad), (cuda, cuda_grad) = found
    torch.testing.assert_close(
        cuda, cpu, rtol=1e-4, atol=0
    )  # bfloat16 products are exact in float32; sums differ in order
    # The gradient of the logits is rounded to bfloat16 (2^-9) before its product with the head, on the GPU alone.
    torch.testing.assert_close(
        cuda_grad.float().cpu(), cpu_grad.float(), rtol=2**-6, atol=2**-7 * cpu_grad.abs().max().item()
    )


def test_memory_is_that_of_a_chunk() -> None:
    """16 384 positions × 151 936 words in float32 are 10 GB; a chunk of 512 works in 14 bytes a logit, 1.1 GB."""
    n, d, v, chunk = 16384, 2048, 151936, 512
    hidden = torch.randn(1, n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = Head(torch.randn(v, d, device="cuda", dtype=torch.bfloat16) * 0.02)
    positions, targets = torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.long)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hidden_losses(hidden, hidden.detach(), targets, positions, head, chunk=chunk).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    # Logits of both in float32 and their gradient in bfloat16; what the compiled losses keep between their passes, at
    # most another 4 bytes. Selected rows of student and teacher, and three gradients of that size, in bfloat16; 10 %
    # for the allocator. Uncompiled losses need 20 bytes a logit, and 2 for the rounded gradient.
    assert peak < 1.1 * ((14 if has_triton() else 22) * chunk * v + 5 * 2 * n * d)

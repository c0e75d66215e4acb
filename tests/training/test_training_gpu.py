"""On a GPU: bfloat16 heads multiply into float32, memory stays bounded, and the loop does not wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from tiny_student import student, tokens
from torch import Tensor

import ahn
from ahn.ops import has_triton
from ahn.training import WindowSchedule, distill
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


@pytest.mark.parametrize("memory", ahn.memory.names())
def test_no_wait_between_logs(memory: str) -> None:
    model = student(memory=memory).cuda()
    schedule = WindowSchedule(sliding_window_type="fixed", total=10, ahn_position="prefix")

    def batches() -> Iterator[Tensor]:
        for step in range(6):
            # The first steps compile kernels and allocate; the last is followed by the read of the losses.
            torch.cuda.set_sync_debug_mode("warn" if step in (3, 4) else "default")
            yield tokens(2, 96, seed=step)

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logs = distill(model, batches(), 6, schedule, log_every=6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(logs) == 6
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    # transformers asks once a forward whether samples are packed; nothing else may wait.
    assert [wait for wait in waits if "masking_utils.py" not in wait] == []
    assert len(waits) <= 2 * 2


def test_not_a_number_stops_before_harm() -> None:
    model, before = student().cuda(), {}
    norm = model.get_decoder().norm.weight

    def batches() -> Iterator[Tensor]:
        for step in range(6):
            if step == 2:
                before.update({name: p.detach().clone() for name, p in ahn.adapter_parameters(model).items()})
                norm.data[0] = torch.nan
            yield tokens(1, 96, seed=step)

    schedule = WindowSchedule(sliding_window_type="fixed", total=10, ahn_position="prefix")
    with pytest.raises(ahn.AHNError, match="Step 2"):
        distill(model, batches(), 6, schedule, log_every=6)
    assert all(torch.equal(p, before[name]) for name, p in ahn.adapter_parameters(model).items())

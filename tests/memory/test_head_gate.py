"""A gate of bfloat16 activations in training is as good as one of their float32 copies, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ahn.memory.base import head_gate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("B", "N", "D", "H"), [(1, 40, 64, 16), (2, 7, 24, 8), (3, 1, 8, 40)])
def test_equals_float32(device: str, bias: bool, B: int, N: int, D: int, H: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(B * N)
    projection = nn.Linear(D, H, bias=bias).to(device)
    x = torch.randn(B, N, D, device=device).bfloat16()
    weights = torch.randn(B, H, N, device=device)
    found, expected = (run(projection, x.detach(), weights, wide) for wide in (False, True))
    gate, grad_x, *grad_parameters = zip(found, expected, strict=True)
    # Two bfloat16 numbers hold a float32 one to 2^-17; sums of D of them in another order.
    scale = x.float().norm(dim=-1).max().item() * projection.weight.norm(dim=-1).max().item()
    torch.testing.assert_close(*gate, rtol=0, atol=2**-16 * scale)
    # The gradient and the weight are each rounded to 2^-9, and so is the result.
    scale = weights.norm(dim=1).max().item() * projection.weight.norm(dim=0).max().item()
    torch.testing.assert_close(*(g.float() for g in grad_x), rtol=2**-8, atol=2**-8 * scale)
    for grads in grad_parameters:
        scale = x.float().flatten(0, 1).norm(dim=0).max().item() * weights.transpose(0, 1).flatten(1).norm(dim=1).max()
        torch.testing.assert_close(*grads, rtol=1e-5, atol=2**-16 * scale.item())


def run(projection: nn.Linear, x: Tensor, weights: Tensor, wide: bool) -> list[Tensor]:
    """The gate, and gradients of its weighted sum; with `wide` from a float32 copy of x."""
    projection.zero_grad()
    leaf = x.clone().requires_grad_()
    gate = projection(leaf.float()).transpose(1, 2) if wide else head_gate(projection, leaf)
    assert gate.dtype == torch.float32
    (gate * weights).sum().backward()
    return [t.detach().clone() for t in (gate, leaf.grad, *(p.grad for p in projection.parameters())) if t is not None]


def test_no_float32_copy_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.randn(2, 50, 32).bfloat16().requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head_gate(nn.Linear(32, 4), x)
    assert kept and not any(t.dtype == torch.float32 and t.numel() >= x.numel() for t in kept)

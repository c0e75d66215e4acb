"""Attention over spans as an operation and inside a student: arguments, results, and whether the kernels ran."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.attend import spans
from ahn.attend.spans_blocks import Columns
from ahn.layout.visibility import FOR_EVER


@dataclasses.dataclass
class Case:
    """Arguments of `spans.attend`, and a gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    until: Tensor
    scaling: float
    gradient: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Every floating-point tensor changed in the same way."""
        parts = {}
        for name, x in vars(self).items():
            parts[name] = change(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        return Case(**parts)

    def cast(self, dtype: torch.dtype) -> Case:
        """In that type."""
        return self.map(lambda x: x.to(dtype))

    def to(self, device: str) -> Case:
        """All tensors on that device."""
        return Case(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars(self).items()})


def made(B: int, Hkv: int, groups: int, n: int, T: int, P: int, seed: int, wide: tuple[bool, bool]) -> Case:
    """Random spans, some of them empty or without end; strides as the model has them."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r)

    rows, heads = B if wide[0] else 1, Hkv if wide[1] else 1
    until = torch.randint(-T, 2 * n + 1, (rows, heads, T), generator=r, dtype=torch.int32)
    until[torch.rand(until.shape, generator=r) < 0.2] = FOR_EVER
    query, gradient = (normal(B, n, Hkv * groups, P).transpose(1, 2) for _ in range(2))
    key, value = (normal(B, Hkv, T + 5, P)[:, :, 3 : 3 + T] for _ in range(2))
    return Case(query, key, value, until, 0.3, gradient)


Attend = Callable[..., Tensor]


def kernels(query: Tensor, key: Tensor, value: Tensor, until: Tensor, scaling: float) -> Tensor:
    """`spans.attend` by kernels, wherever they run."""
    return spans.Spans.apply(query, key, value, Columns(until, query.shape[2]), scaling)


def results(attend: Attend, case: Case) -> dict[str, Tensor]:
    """The output and all gradients."""
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in ("query", "key", "value")}
    out = attend(*leaves.values(), case.until, case.scaling)
    out.backward(case.gradient)
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def learned(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, checkpointing: bool) -> dict[str, Tensor]:
    """Output of a student, and gradients of its memory and of its input."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    parameters = ahn.adapter_parameters(model)
    logits = model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits.float()
    if mask is not None:
        logits = logits * mask[..., None]
    gradients = torch.autograd.grad(logits.square().mean(), [x, *parameters.values()], allow_unused=True)
    model.gradient_checkpointing_disable()
    found = dict(zip(["input", *parameters], gradients, strict=True))
    return {"logits": logits.detach()} | {name: x for name, x in found.items() if x is not None}


@contextlib.contextmanager
def used() -> Iterator[list[int]]:
    """Counts the calls of the kernels."""
    calls, forward = [0], spans.Spans.forward
    with pytest.MonkeyPatch.context() as patch:

        def counted(*args: Any) -> Tensor:
            calls[0] += 1
            return forward(*args)

        patch.setattr(spans.Spans, "forward", staticmethod(counted))
        yield calls

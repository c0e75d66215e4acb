"""Shared set-up: one thread per worker (tests run side by side), a seed for every test, Triton without a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import bounds, effort, interpreting, operators

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and in processes that tests start: sums in another order have other bits

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


# How long an example takes is the machine's and its other users', and says nothing of what is tested.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    effort.everything = "not slow" not in config.option.markexpr


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    effort.mark_what_is_left_out(items)


def pytest_collection_finish() -> None:
    gc.freeze()  # collecting garbage then looks at what tests made, not at a million objects of what they import


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _hastened_operators() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        operators.hasten(patch)
        yield


@pytest.fixture(scope="session")
def triton() -> Iterator[None]:
    """Our kernels, on a GPU or interpreted, with their bounds checked; not everywhere is there a Triton."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            bounds.guard(patch)
            interpreting.hasten(patch)
        yield


@pytest.fixture
def bfloat16_products(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels multiply numbers: of bfloat16 Triton's own interpreter multiplies the bit patterns."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def exact(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32), tl.float32)

    def product(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return multiply(self, exact(a), exact(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN: what a kernel does not fill, or reads before it is filled, shows."""

    def filled(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k)))

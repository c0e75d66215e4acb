"""Shared set-up: one thread per worker (tests run side by side), a seed for every test, Triton without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def triton() -> None:
    """Our kernels, on a GPU or interpreted; not everywhere is there a Triton."""
    pytest.importorskip("triton")

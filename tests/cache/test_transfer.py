"""Tensors that are read and copied in pieces are what they were; tests/gpu/test_serving_gpu.py brings them to a GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from ahn.cache.transfer import PIECE, Transfer

CPU = torch.device("cpu")


def test_pieces_make_a_tensor(tmp_path: Path) -> None:
    x = torch.randn(PIECE // 4 + 3)
    content = x.numpy().tobytes()
    (tmp_path / "file").write_bytes(b"abc" + content)
    with (tmp_path / "file").open("rb") as handle, Transfer(CPU) as transfer:
        read, digest = transfer.read(handle.fileno(), 3, tuple(x.shape), x.dtype)
        copied = transfer.copy(x)
    assert torch.equal(read, x) and torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
    assert digest.result() == hashlib.sha256(content).digest()


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    with (tmp_path / "file").open("rb") as handle, pytest.raises(EOFError), Transfer(CPU) as transfer:
        transfer.read(handle.fileno(), 0, (2,), torch.float32)

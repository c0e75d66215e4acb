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
    with Transfer(CPU) as transfer:
        read, digest = transfer.read(tmp_path / "file", 3, tuple(x.shape), x.dtype)
        copied = transfer.copy(x)
    (tmp_path / "other").write_bytes(b"abc")
    with Transfer(CPU) as transfer:
        written = transfer.write(tmp_path / "other", 2, x)
    assert (tmp_path / "other").read_bytes() == b"ab" + content and written.result() == digest.result()
    assert torch.equal(read, x) and torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
    assert digest.result() == hashlib.sha256(content).digest()


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    with pytest.raises(EOFError), Transfer(CPU) as transfer:
        transfer.read(tmp_path / "file", 0, (2,), torch.float32)

"""The safetensors reader and writer against the safetensors library, and against damaged files."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ahn.checkpoint import stream
from ahn.errors import AHNError

TENSORS = {
    "b": torch.arange(12).view(3, 4).to(torch.bfloat16),
    "odd": torch.arange(3).to(torch.uint8),
    "wide": torch.randn(5, 2, dtype=torch.float64),
    "a": torch.tensor([1.0, float("nan"), float("-inf")]),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
    "unicode.ñ": torch.ones(2),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_header_says_what_the_library_wrote(file: Path) -> None:
    entries = stream.read_header(file)
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    content = file.read_bytes()
    for name, entry in entries.items():
        expected = bytes(TENSORS[name].contiguous().view(-1).view(torch.uint8).tolist())
        assert content[entry.offset : entry.offset + entry.size] == expected


def test_floats_are_read_in_their_dtype(file: Path) -> None:
    entries = stream.read_header(file)
    for name in ("a", "b", "wide", "scalar", "empty"):
        read = stream.read_tensor(entries[name])
        assert read.dtype == TENSORS[name].dtype
        torch.testing.assert_close(read, TENSORS[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(AHNError, match="U8"):
        stream.read_tensor(entries["odd"])


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_written_file_is_read_by_the_library(
    file: Path, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLICE", size)
    seen: list[tuple[int, int]] = []
    entries = stream.read_header(file)
    total = sum(entry.size for entry in entries.values())
    stream.write_file(tmp_path / "y", entries, stream.Meter(total, lambda *state: seen.append(state)))
    written = load_file(tmp_path / "y")
    assert written.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    for entry in stream.read_header(tmp_path / "y").values():  # readers may map the file and need alignment
        assert entry.offset % max(1, entry.width) == 0


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 32 << 20
    source = write_raw(tmp_path / "big", {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    with source.open("ab") as handle:
        handle.truncate(source.stat().st_size + size)  # a sparse file: no disk is used
    monkeypatch.setattr(stream, "SLICE", 1 << 20)
    entries = stream.read_header(source)
    tracemalloc.start()
    stream.write_file(tmp_path / "copy", entries, stream.Meter(size, None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "copy").stat().st_size > size
    assert peak < 2 << 20  # one slice of 1 MiB and small change


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(AHNError, match=r"x\.safetensors.*(truncated|corrupt|header)"):
        stream.read_header(path)


def test_bytes_after_the_end_are_refused(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"0")
    with pytest.raises(AHNError, match="not fully covered"):
        stream.read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe\xfd\xfc",
        [1, 2],
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
        {"x": {"dtype": "F32", "shape": ["two"], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
    ],
    ids=["text", "bytes", "list", "number", "no-offsets", "size", "negative", "shape", "hole", "overlap"],
)
def test_corrupt_headers_are_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(AHNError, match="corrupt"):
        stream.read_header(write_raw(tmp_path / "x", header, b"\0" * 8))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AHNError, match="No such file"):
        stream.read_header(tmp_path / "absent")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 a pickle in a zip" * 10)
    with pytest.raises(AHNError, match="not a safetensors file"):
        stream.read_header(tmp_path / "zip")


def test_a_file_that_shrinks_while_copied_is_noticed(file: Path, tmp_path: Path) -> None:
    entries = stream.read_header(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(AHNError, match="ended while it was copied"):
        stream.write_file(tmp_path / "y", entries, stream.Meter(1, None))

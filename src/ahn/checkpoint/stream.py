"""The safetensors format as byte ranges: files are checked and rewritten without holding a tensor in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ahn.errors import AHNError
from ahn.files import json_object

SLICE = 16 << 20  # bytes copied at once: bounds the memory of a copy whatever the tensor's size
MAX_HEADER = 100_000_000  # bytes, the limit that the safetensors library itself sets
BITS = {"BOOL": 8, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: `size` bytes from byte `offset` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Meter:
    """Adds up copied bytes and reports them to a `Progress` callback."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.done, self.report = total, 0, report

    def advance(self, count: int) -> None:
        self.done += count
        if self.report is not None:
            self.report(self.done, self.total)


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, in the order of its bytes.

    Raises:
        AHNError: the file is missing, truncated, longer than its header says, or not safetensors.
    """
    try:
        total = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if total < 8 or length > total - 8:
                raise AHNError(f"{file} is truncated or not a safetensors file ({total} bytes): download it again.")
            if length > MAX_HEADER:
                raise AHNError(f"{file} is not a safetensors file: its header would have {length} bytes.")
            header = json_object(handle.read(length), f"The safetensors header of {file}")
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, fields) for name, fields in header.items()}
    except OSError as error:
        raise AHNError(f"{file} cannot be read: {error.strerror or error}.") from error
    except AHNError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AHNError(f"{file} has a corrupt safetensors header: download it again.") from error
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].offset))
    _check_layout(file, 8 + length, total, ordered)
    return ordered


def _entry(file: Path, start: int, fields: dict[str, Any]) -> Entry:
    begin, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
        raise ValueError("sizes must be whole numbers")
    entry = Entry(file, str(fields["dtype"]), shape, start + begin, end - begin)
    bits = BITS.get(entry.dtype)
    if end < begin or (bits is not None and entry.size * 8 != bits * math.prod(shape)):
        raise ValueError("byte range and shape disagree")
    return entry


def _check_layout(file: Path, start: int, total: int, entries: Mapping[str, Entry]) -> None:
    """The byte ranges must follow each other without holes and end where the file ends."""
    position = start
    for entry in entries.values():
        if entry.offset != position:
            raise AHNError(f"{file} has a corrupt safetensors header: download it again.")
        position += entry.size
    if position != total:
        problem = "is truncated" if total < position else "has bytes after its last tensor"
        raise AHNError(f"{file} {problem}: its header says {position} bytes, it has {total}. Download it again.")


def read_tensor(entry: Entry) -> Tensor:
    """One floating-point tensor, in its stored dtype, on the CPU."""
    if entry.dtype not in FLOATS:
        raise AHNError(f"{entry.file} stores a tensor as {entry.dtype}; memories need one of {', '.join(FLOATS)}.")
    with entry.file.open("rb") as handle:
        handle.seek(entry.offset)
        data = bytearray(handle.read(entry.size))
    if len(data) != entry.size:
        raise AHNError(f"{entry.file} ended while it was read: download it again.")
    if not data:
        return torch.empty(entry.shape, dtype=FLOATS[entry.dtype])
    return torch.frombuffer(data, dtype=FLOATS[entry.dtype]).view(entry.shape)


def write_file(file: Path, tensors: Mapping[str, Entry], meter: Meter) -> None:
    """Write `tensors` into a new safetensors file, byte for byte from where they lie, one slice at a time."""
    # Wide dtypes first, as the reference serializer does: every tensor is then aligned for its dtype.
    ordered = sorted(tensors.items(), key=lambda item: -BITS.get(item[1].dtype, 8))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, entry in ordered:
        offsets = [position, position + entry.size]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for _, entry in ordered:
            _copy(entry, target, meter)


def _copy(entry: Entry, target: BinaryIO, meter: Meter) -> None:
    buffer = memoryview(bytearray(min(SLICE, entry.size)))
    left = entry.size
    with entry.file.open("rb", buffering=0) as source:
        source.seek(entry.offset)
        while left:
            count = source.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise AHNError(f"{entry.file} ended while it was copied: download it again.")
            target.write(buffer[:count])
            left -= count
            meter.advance(count)

"""The safetensors format as byte ranges: files are checked and rewritten without holding a tensor in memory."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ahn.errors import AHNError, reason
from ahn.files import check_readable

SLICE = 16 << 20  # bytes copied at once: bounds the memory of a copy whatever the tensor's size
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

    @property
    def width(self) -> int:
        """Bytes of a number; 0 where there is none, or several share one."""
        return self.size // max(1, math.prod(self.shape))


class Meter:
    """Adds up copied bytes and reports them to a `Progress` callback."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.done, self.report = total, 0, report

    def advance(self, count: int) -> None:
        self.done += count
        if self.report is not None:
            self.report(self.done, self.total)


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, in the order of its bytes."""
    check_readable(file)
    try:
        with safe_open(file, "pt"):  # the library has then checked all that follows
            pass
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except SafetensorError as error:
        raise AHNError(
            f"{file} is truncated, corrupt or not a safetensors file, download it again: {error}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AHNError(f"{file} cannot be read: {reason(error)}.") from error
    header.pop("__metadata__", None)
    entries = []
    for name, fields in header.items():
        begin, end = fields["data_offsets"]
        entries.append((name, Entry(file, fields["dtype"], tuple(fields["shape"]), 8 + length + begin, end - begin)))
    return dict(sorted(entries, key=lambda item: item[1].offset))


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
    ordered = sorted(tensors.items(), key=lambda item: -item[1].width)
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

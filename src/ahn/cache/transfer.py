"""Tensors on their way between a file or the CPU's memory and where a model is: by several threads, in pieces.

A large model's conversation is a gigabyte: it is read or written, its digests are worked out, and a GPU takes or gives
it. Each thread does all three for a piece while the others are at theirs. A GPU copies to and from memory that stays in
its place; torch keeps such buffers and hands them out again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

THREADS = min(12, os.cpu_count() or 1)
PIECE = 4 << 20
"""Bytes; of a GPU's copy, so many are waiting for it in each thread."""


class Transfer:
    """Tensors of a device that are filled while the block goes on, and are whole when it has ended.

    Other work of the device goes on meanwhile, but for what it was given before the block began.

    Args:
        device: where they are to be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ahn-transfer")
        self._work: list[Future[Any]] = []

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if self._stream is not None:
            self._stream.synchronize()
        if error is None:
            for work in self._work:
                work.result()

    def read(self, file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Future[bytes]]:
        """A tensor of what a file holds from a byte on, and the sha256 of these bytes.

        Raises:
            EOFError: by the future: the file ends before.
        """
        tensor = self._empty(shape, dtype)
        return tensor, self._submit(self._read, file, offset, tensor)

    def write(self, file: Path, offset: int, x: Tensor) -> Future[bytes]:
        """Write a tensor that does not change meanwhile into a file that is there; the sha256 of its bytes."""
        x = x.contiguous()
        self._wait_for_others()  # who may still be working on it
        return self._submit(self._write, file, offset, x)

    def copy(self, x: Tensor) -> Tensor:
        """A copy of a tensor that is anywhere and does not change meanwhile."""
        if self._stream is None or x.device.type != "cpu" or not x.is_contiguous():
            return x.to(self.device, copy=True)
        tensor = self._empty(tuple(x.shape), x.dtype)
        self._submit(self._copy, x, tensor)
        return tensor

    def _submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
        self._work.append(self._pool.submit(work, *given))
        return self._work[-1]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self._wait_for_others()  # what was in this memory before may still be in use
        return tensor

    def _wait_for_others(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _read(self, file: Path, offset: int, tensor: Tensor) -> bytes:
        digest = hashlib.sha256()  # Python lets other threads run while it hashes, reads and writes

        def fill(piece: Tensor, place: int) -> None:
            content, done = piece.numpy().data, 0
            while done < len(content):
                if not (got := handle.readinto(content[done:])):
                    raise EOFError("the file ends before its last tensor")
                done += got
            digest.update(content)

        with file.open("rb", buffering=0) as handle:
            handle.seek(offset)
            self._fill(tensor, fill)
        return digest.digest()

    def _write(self, file: Path, offset: int, x: Tensor) -> bytes:
        digest, source = hashlib.sha256(), _bytes(x)
        with file.open("r+b", buffering=0) as handle:
            handle.seek(offset)
            for place in range(0, len(source), PIECE):
                content, done = self._on_cpu(source[place : place + PIECE]).numpy().data, 0
                digest.update(content)
                while done < len(content):
                    done += handle.write(content[done:])
        return digest.digest()

    def _on_cpu(self, piece: Tensor) -> Tensor:
        if self._stream is None or piece.device != self.device:
            return piece.cpu()
        with torch.cuda.stream(self._stream):
            return torch.empty(len(piece), dtype=torch.uint8, pin_memory=True).copy_(piece)

    def _copy(self, x: Tensor, tensor: Tensor) -> None:
        source = _bytes(x)
        self._fill(tensor, lambda piece, place: piece.copy_(source[place : place + len(piece)]))

    def _fill(self, tensor: Tensor, fill: Callable[[Tensor, int], object]) -> None:
        """Let `fill` write each piece of a tensor, as bytes on the CPU, whose place in it it is told."""
        target = _bytes(tensor)
        for place in range(0, len(target), PIECE):
            piece = target[place : place + PIECE]
            if self._stream is None:
                fill(piece, place)
                continue
            with torch.cuda.stream(self._stream):
                buffer = torch.empty(len(piece), dtype=torch.uint8, pin_memory=True)
                fill(buffer, place)
                piece.copy_(buffer, non_blocking=True)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)

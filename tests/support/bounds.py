"""Interpreted kernels may read and write what they were given, and nothing beside it.

A GPU does not notice a load a few bytes before a tensor, until one day nothing lies there; nor does a comparison of
results, where what was read is not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch


class Bounds:
    """The memory of a kernel's tensors, as intervals that do not touch."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans = sorted(_span(x) for x in tensors if x.numel())
        joined: list[list[int]] = []
        for first, last in spans:
            if joined and first <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], last)
            else:
                joined.append([first, last])
        self.first, self.last = (np.array([span[n] for span in joined], dtype=np.uint64) for n in (0, 1))

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
        asked = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[mask.astype(bool)]
        if not asked.size:
            return
        at = np.searchsorted(self.first, asked.astype(np.uint64), side="right").astype(np.int64) - 1
        inside = (at >= 0) & (asked + np.uint64(size) <= self.last[at.clip(0)])
        if not inside.all():
            nearest = self.first[np.abs(self.first.astype(np.int64) - int(asked[~inside][0])).argmin()]
            distance = int(asked[~inside][0]) - int(nearest)
            raise IndexError(f"A kernel {what} outside of its tensors, {distance} bytes from where one begins.")


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)


def _span(x: torch.Tensor) -> tuple[int, int]:
    """Of all that a tensor may be a view of: kernels are given strides, too."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every load and store of interpreted kernels from now on."""
    from triton.runtime import interpreter

    held: list[Bounds] = [Bounds(())]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, to_host = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        size = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        held[0].check(ptrs.data, mask.data, size, "reads")
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        held[0].check(ptrs.data, mask.data, value.data.dtype.itemsize, "writes")
        return store(self, ptrs, value, mask, *rest)

    def known(self: Any, args: Any, kwargs: Any) -> Any:
        found = to_host(self, args, kwargs)
        held[0] = Bounds(_tensors((*found[0], *found[1].values())))
        return found

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(executor, "_init_args_hst", known)

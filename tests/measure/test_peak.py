"""The peak of a piece of work, seen from outside."""

from __future__ import annotations

import sys

import pytest
import torch

from ahn.measure import peak


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_peak_sees_what_was_freed_again() -> None:
    size = 64 << 20

    def grow(count: int) -> int | None:
        with peak.exact_allocator(), peak.measure(torch.device("cpu")) as measured:
            for _ in range(count):
                torch.ones(size // 4).sum()
        return measured.growth

    if grow(1) is None:
        pytest.skip("this system does not let a process reset its peak")
    # One tensor at a time: the peak does not depend on how often. The kernel counts pages in batches (2 MiB), and the
    # process does other things too (16 MiB).
    for count in (1, 3):
        assert size - (2 << 20) <= grow(count) < size + (16 << 20)  # type: ignore[operator]


def test_what_was_held_before_counts_in_the_total() -> None:
    with peak.measure(torch.device("cpu"), held=1000) as measured:
        pass
    assert measured.reserved is None
    assert measured.total == (None if measured.growth is None else 1000 + measured.growth)
    assert peak.so_far() > 10 << 20  # torch alone is more

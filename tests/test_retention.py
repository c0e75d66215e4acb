"""Intervals of kept tokens against a list that is sorted after every arrival."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahn.ops import retention


def one_by_one(held: list[float], arriving: list[float]) -> tuple[list[int], list[int]]:
    capacity = len(held)
    kept = [(-p, i) for i, p in enumerate(held)]
    ends = [len(arriving)] * (len(held) + len(arriving))
    for now, priority in enumerate(arriving):
        ranked = sorted([*kept, (-priority, capacity + now)])  # of equals the older first
        kept = ranked[:capacity]
        for _, dropped in ranked[capacity:]:
            ends[dropped] = now
    return ends, [i for _, i in kept]


@given(
    capacity=st.integers(1, 9),
    arriving=st.lists(st.integers(0, 12), max_size=40),
    free=st.integers(0, 9),
    block=st.integers(1, 50),
    seed=st.integers(0, 999),
)
@settings(max_examples=120, deadline=None)
def test_one_by_one(capacity: int, arriving: list[int], free: int, block: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    held = torch.randint(0, 12, (capacity,), generator=random).float()
    held[:free] = float("-inf")
    held = held.sort(descending=True).values
    new = torch.tensor(arriving, dtype=torch.float32)
    new[torch.rand(len(new), generator=random) < 0.1] = float("-inf")
    expected, kept = one_by_one(held.tolist(), new.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "BLOCK", block)
        old_ends, new_ends, found = retention.dropped_at(held[None, None], new[None, None])
    assert torch.cat([old_ends, new_ends], -1)[0, 0].tolist() == expected
    assert found[0, 0].tolist() == kept


def test_every_head_for_itself() -> None:
    held, new = torch.randn(2, 3, 5).sort(descending=True).values, torch.randn(2, 3, 31)
    whole = retention.dropped_at(held, new)
    for b in range(2):
        for h in range(3):
            for part, own in zip(whole, retention.dropped_at(held[b, h], new[b, h]), strict=True):
                assert torch.equal(part[b, h], own)


def test_tokens_of_no_priority_are_never_kept() -> None:
    held, new = torch.full((4,), float("-inf")), torch.tensor([float("-inf"), 1.0, float("-inf"), 2.0])
    _, ends, kept = retention.dropped_at(held, new)
    assert ends.tolist() == [0, 4, 2, 4]
    assert kept[:2].tolist() == [7, 5]

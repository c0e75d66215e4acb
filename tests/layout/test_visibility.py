"""Who sees what (docs/spec.md, section 2), against an oracle that knows only lists of positions.

Every token is its own position in its row: keys, values and gates that go through a cache carry that number, so what
attention sees and what is written can be read off as lists.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.effort import examples
from torch import Tensor

from ahn import AHNCache, AHNConfig, AHNError
from ahn.cache.layer import AHNLayer
from ahn.layout.visibility import Padding, Visibility

CPU = torch.device("cpu")
PAD = -1.0  # the "position" of padding
Chunk = list[int]  # real tokens of each row; shorter rows are padded on the left


@dataclasses.dataclass
class Case:
    window: int
    sinks: int
    chunks: list[Chunk]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Chunks of any size, with rows that get fewer tokens or none, and runs of single steps (the ring)."""
    rows = draw(st.integers(1, 3))
    every = st.integers(1, 9).map(lambda n: [[n] * rows])
    steps = st.integers(1, 9).map(lambda n: [[1] * rows] * n)
    ragged = st.lists(st.integers(0, 9), min_size=rows, max_size=rows).filter(any).map(lambda chunk: [chunk])
    parts = draw(st.lists(st.one_of(every, steps, ragged), min_size=1, max_size=6))
    return Case(draw(st.integers(1, 6)), draw(st.integers(0, 4)), [chunk for part in parts for chunk in part])


def visible(case: Case, t: int) -> list[int]:
    """Oracle: positions that exact attention sees at position t."""
    return sorted(set(range(min(case.sinks, t + 1))) | set(range(max(0, t - case.window + 1), t + 1)))


def memory(case: Case, t: int) -> list[int]:
    """Oracle: positions in the memory that t reads, in the order of their writing."""
    return list(range(case.sinks, t - case.window + 1))


def new_tokens(chunk: Chunk, seen: list[int]) -> Tensor:
    """(B, n) positions of the chunk's columns, `PAD` for padding, after `seen` real tokens of each row."""
    length = max(chunk)
    rows = [
        [PAD] * (length - count) + [float(start + i) for i in range(count)]
        for count, start in zip(chunk, seen, strict=True)
    ]
    return torch.tensor(rows)


def numbers(x: Tensor) -> list[int]:
    return [int(value) for value in x]


class Reader:
    """Feeds chunks through one layer of a cache and compares everything with the oracle."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.layer = AHNLayer(AHNConfig(window=case.window, sinks=case.sinks))
        self.cache = AHNCache(AHNConfig(window=case.window, sinks=case.sinks), [self.layer])
        rows = len(case.chunks[0])
        self.seen = [0] * rows
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self.columns = torch.zeros(rows, 0, dtype=torch.long)

    def read(self, chunk: Chunk) -> None:
        new = new_tokens(chunk, self.seen)
        self.columns = torch.cat([self.columns, (new != PAD).long()], dim=1)
        view = self.cache.begin(len(chunk), new.shape[1], self.columns, CPU)
        x = new[:, None, :, None]
        keys, values = self.layer.update(x, x.clone())
        mask = view.held_mask
        self.check_attention(new, keys, mask)
        assert torch.equal(keys, values)
        gone, gone_values, gates = self.layer.evict(keys, values, {"gate": x[..., 0]})
        assert torch.equal(gone, gone_values) and torch.equal(gone[..., 0], gates["gate"])
        self.cache.finish(self.layer)
        self.check_memory(new, view, gone[:, 0, :, 0])
        self.seen = [start + count for start, count in zip(self.seen, chunk, strict=True)]
        self.check_kept()

    def check_attention(self, new: Tensor, keys: Tensor, mask: Tensor | None) -> None:
        if mask is None:
            mask = torch.ones(1, 1, new.shape[1], keys.shape[2], dtype=torch.bool)
        mask = mask.expand(len(new), 1, -1, -1)
        assert mask.any(-1).all(), "a softmax over nothing is NaN"
        for row, positions in enumerate(new.tolist()):
            for i, t in enumerate(positions):
                if t != PAD:
                    assert sorted(numbers(keys[row, 0, mask[row, 0, i], 0])) == visible(self.case, int(t))

    def check_memory(self, new: Tensor, view: Visibility, gone: Tensor) -> None:
        writable = torch.ones_like(gone, dtype=torch.bool) if view.writable is None else view.writable
        assert gone.shape[1] == view.evicted
        tail = new.shape[1] - view.evicted
        counts = view.written.expand(len(new), -1)
        for row, positions in enumerate(new.tolist()):
            for i, t in enumerate(positions):
                if i >= tail and bool(writable[row, i - tail]):
                    self.written[row].append(int(gone[row, i - tail]))
                if t != PAD:
                    assert self.written[row] == memory(self.case, int(t))
                    if i >= tail:
                        assert max(0, int(counts[row, i - tail])) == len(self.written[row])

    def check_kept(self) -> None:
        kept = copy.deepcopy(self.layer).tensors()  # the layer itself stays in fixed slots while it steps
        assert torch.equal(kept["keys"], kept["values"]) and torch.equal(kept["keys"][..., 0], kept["gates.gate"])
        window, sinks = self.case.window, self.case.sinks
        for row, seen in enumerate(self.seen):
            keys = numbers(kept["keys"][row, 0, :, 0])
            if self.columns.shape[1] <= sinks + window:
                assert keys[len(keys) - seen :] == list(range(seen))
                continue
            assert len(keys) == sinks + window
            assert keys[: min(sinks, seen)] == list(range(min(sinks, seen)))
            last = list(range(max(0, seen - window), seen))
            assert keys[len(keys) - len(last) :] == last


@given(cases())
@settings(max_examples=examples(50, 150))
# A row with less than a new message's padding behind it: its sinks stay in their slots.
@example(Case(window=4, sinks=4, chunks=[[20, 10], [10, 2], [1, 1], [1, 1]]))
# A row that says nothing for longer than the window, then goes on.
@example(Case(window=2, sinks=3, chunks=[[9, 2], [7, 0], [7, 0], [3, 4], [1, 1], [1, 1]]))
def test_cache_follows_the_rule(case: Case) -> None:
    reader = Reader(case)
    for chunk in case.chunks:
        reader.read(chunk)


@given(cases(), st.data())
@settings(max_examples=examples(50, 150))
def test_one_forward_without_cache_follows_the_rule(case: Case, data: st.DataObject) -> None:
    """Training: all tokens at once, padded on the left or on the right."""
    counts = case.chunks[0]
    rows, length = len(counts), max(counts)
    right = data.draw(st.booleans())
    new = new_tokens(counts, [0] * rows)
    if right:
        new = torch.stack([row.roll(count - length) for row, count in zip(new, counts, strict=True)])
    nothing = Padding.none(rows, CPU)
    view = Visibility(case.window, case.sinks, 0, length, CPU, nothing, nothing.advance(new != PAD))
    reader = Reader(case)
    keys = new[:, None, :, None]
    reader.check_attention(new, keys, view.mask)
    reader.check_memory(new, view, view.evicted_slots(keys)[:, 0, :, 0])


@given(cases())
@settings(max_examples=examples(15, 50))
def test_a_forward_without_new_padding_needs_no_mask(case: Case) -> None:
    """The cache remembers the padding that it has seen."""
    with_mask, without = Reader(case), Reader(case)
    for chunk in case.chunks:
        with_mask.read(chunk)
        if len(set(chunk)) == 1:  # nothing new to say about padding
            begin = without.cache.begin
            without.cache.begin = lambda batch, length, mask, device, begin=begin: begin(batch, length, None, device)
            without.read(chunk)
            without.cache.begin = begin
        else:
            without.read(chunk)
    assert torch.equal(with_mask.layer.keys, without.layer.keys)


def test_padding_between_real_tokens_is_refused() -> None:
    cache = Reader(Case(2, 1, [[1]])).cache
    with pytest.raises(AHNError, match="padding between real tokens"):
        cache.begin(1, 3, torch.tensor([[1, 0, 1]]), CPU)


@pytest.mark.parametrize("repeat_mask", [True, False])
def test_no_token_may_follow_padding_on_the_right(repeat_mask: bool) -> None:
    reader = Reader(Case(2, 1, [[3, 3]]))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    x = torch.zeros(2, 1, 3, 1)
    reader.cache.begin(2, 3, mask, CPU)
    reader.layer.evict(*reader.layer.update(x, x), {})
    reader.cache.finish(reader.layer)
    with pytest.raises(AHNError, match="padding between real tokens"):
        reader.cache.begin(2, 1, torch.cat([mask, torch.ones(2, 1)], dim=1) if repeat_mask else None, CPU)


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 3, 3)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AHNError, match="attention_mask"):
        Reader(Case(2, 1, [[3, 3]])).cache.begin(2, 3, torch.ones(shape), CPU)


def test_another_batch_size_is_refused() -> None:
    reader = Reader(Case(2, 1, [[3, 3]]))
    reader.read([3, 3])
    with pytest.raises(AHNError, match="holds 2 sequences, the input has 3"):
        reader.cache.begin(3, 1, None, CPU)

"""Conversations cut into forwards in any way, padded or not, and what must be the same about them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from golden import relative_error
from hypothesis import strategies as st
from models import positions, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.cache.layer import AHNLayer

TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention


@torch.no_grad()
def read(
    model: PreTrainedModel, ids: Tensor, pieces: list[int], cache: ahn.AHNCache, mask: Tensor | None = None
) -> Tensor:
    """Logits of ids (B, L) fed in pieces of so many tokens to a live cache; mask (B, seen + L)."""
    logits, start = [], cache.seen
    for length in pieces:
        at = cache.seen - start
        extra: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : cache.seen + length]
            extra = {"attention_mask": seen, "position_ids": positions(seen)[:, -length:]}
        logits.append(model(ids[:, at : at + length], past_key_values=cache, **extra).logits)
    return torch.cat(logits, dim=1)


def tolerance(name: str) -> float:
    """Scores wait in bfloat16: one that differs in its last float32 digits may be rounded the other way."""
    return 2**-8 if name in ("gates.score", "state.scores") else TOLERANCE


def assert_same_layers(found: ahn.AHNCache, expected: ahn.AHNCache) -> None:
    for index, layer in expected.memory_layers.items():
        other, own = found.memory_layers[index].tensors(), layer.tensors()
        assert other.keys() == own.keys()
        for name, x in own.items():
            y = other[name]
            if "state.groups" in own and name in ("state.keys", "state.values"):  # slots of no group hold anything
                used = (own["state.groups"] >= 0)[:, None, :, None]
                x, y = x.where(used, 0), y.where(used, 0)
            assert relative_error(y, x) < tolerance(name), (index, name)


pieces = st.lists(st.one_of(st.integers(1, 20), st.just(1)), min_size=2, max_size=12)


@dataclasses.dataclass
class Turns:
    """What a batch reads: for each forward the number of real tokens of each row, the rest padded on the left."""

    window: int
    sinks: int
    chunks: list[list[int]]


@st.composite
def turns(draw: st.DrawFn) -> Turns:
    rows = draw(st.integers(2, 3))
    ragged = st.lists(st.integers(0, 14), min_size=rows, max_size=rows).filter(any).map(lambda chunk: [chunk])
    steps = st.integers(1, 6).map(lambda n: [[1] * rows] * n)
    parts = draw(st.lists(st.one_of(ragged, steps), min_size=1, max_size=5))
    chunks = [chunk for part in parts for chunk in part]
    return Turns(draw(st.integers(1, 8)), draw(st.integers(0, 4)), chunks)


def padded(chunks: list[list[int]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ids (B, L), mask (B, L), and each row's real tokens."""
    rows = [tokens(1, max(1, sum(counts)), seed=i)[0] for i, counts in enumerate(zip(*chunks, strict=True))]
    used = [0] * len(rows)
    ids, mask = [], []
    for chunk in chunks:
        block, real = torch.zeros(2, len(rows), max(chunk), dtype=torch.long)
        for row, count in enumerate(chunk):
            if count:
                block[row, -count:] = rows[row][used[row] : used[row] + count]
                real[row, -count:] = 1
            used[row] += count
        ids.append(block)
        mask.append(real)
    return torch.cat(ids, 1), torch.cat(mask, 1), rows


def kept(layer: AHNLayer, row: int, real: int) -> dict[int, Tensor]:
    """Position to key and value of what a row's cache holds exactly."""
    held = layer.tensors()
    x = torch.cat([held["keys"], held["values"]], dim=-1)[row].transpose(0, 1)
    if layer.get_seq_length() <= layer.config.lossless:
        return dict(enumerate(x[len(x) - real :]))
    window = range(max(0, real - layer.config.window), real)
    sinks = {t: x[t] for t in range(min(layer.config.sinks, real))}
    return dict(zip(window, x[len(x) - len(window) :], strict=True)) | sinks


def assert_rows_alone(model: PreTrainedModel, turns: Turns) -> None:
    """Each row of a padded conversation has the logits, the window and the state that it has alone."""
    ids, mask, rows = padded(turns.chunks)
    together = ahn.AHNCache.for_model(model)
    logits = read(model, ids, [max(chunk) for chunk in turns.chunks], together, mask)
    assert torch.isfinite(logits).all()
    for row, own in enumerate(rows):
        real = int(mask[row].sum())
        if not real:
            continue
        alone = ahn.AHNCache.for_model(model)
        expected = read(model, own[None, :real], [real], alone)
        assert relative_error(logits[row, mask[row].bool()], expected[0]) < TOLERANCE
        for index, layer in alone.memory_layers.items():
            other = together.memory_layers[index]
            mine, its = kept(other, row, real), kept(layer, 0, real)
            assert mine.keys() <= its.keys() and set(range(max(0, real - turns.window), real)) <= mine.keys()
            assert all(relative_error(mine[t], its[t]) < TOLERANCE for t in mine)
            others = other.tensors()
            for name, part in layer.tensors().items():
                if name.startswith("state.") and "state.groups" not in others:  # pools of no token hold anything
                    assert relative_error(others[name][row], part[0]) < tolerance(name), name

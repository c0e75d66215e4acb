"""How much a chunk of a long text takes where one score is for all heads: operators a layer, and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import awaken, base, read, tokens
from support.work import Work

import ahn

WINDOW, ROWS, CHUNK, SLOTS = 32, 3, 32, 128
SHAPE: dict[str, Any] = {"sinks": 4, "slots": SLOTS, "passage": 4, "key_bits": 4, "value_bits": 2, "max_distance": 512}
MOST = {"side by side": 340, "padded": 260}
"""Operators of a layer, 36 of them a CPU's way to find codes, 50 the base's: a tenth above what was counted."""


@torch.no_grad()
def chunk(layers: int, rows: str, score_layer: int | None = 1) -> Work:
    """One chunk when the memory is full and far tokens move: every 32 tokens, in padded rows each at its own."""
    config = ahn.AHNConfig("retained", WINDOW, score_layer=score_layer, **SHAPE)
    model = awaken(ahn.attach(base("llama", num_hidden_layers=layers), config))
    ids, mask, seen = tokens(ROWS, 400), torch.ones(ROWS, 400, dtype=torch.long), 333
    if rows == "padded":
        mask[1, :7], mask[2, :19] = 0, 0
    _, cache = read(model, ids[:, :seen], [seen], mask[:, :seen])
    with Work() as work:
        model(ids[:, seen : seen + CHUNK], past_key_values=cache, attention_mask=mask[:, : seen + CHUNK])
    return work


@pytest.mark.parametrize("rows", MOST)
def test_what_layers_have_in_common_is_done_once(rows: str) -> None:
    few, many = chunk(2, rows), chunk(4, rows)
    assert (many.calls.total() - few.calls.total()) / 2 <= MOST[rows]
    of_all_kept = ROWS * CHUNK * SLOTS  # who sees whom: no layer makes a mask of its own, and no head
    assert many.of_size(of_all_kept, torch.bool) == few.of_size(of_all_kept, torch.bool) <= 6


@pytest.mark.parametrize("score_layer", [1, None])
def test_a_gpu_is_waited_for_once_a_forward(score_layer: int | None) -> None:
    """By padded rows, whose lengths are on it; by no layer of its own."""
    few, many = (chunk(layers, "padded", score_layer).calls for layers in (2, 3))
    waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh")
    assert [few[name] for name in waiting] == [many[name] for name in waiting]

"""Captured steps beyond the distance that a base knows: sinks move along, and nobody asks the device each time."""

from __future__ import annotations

import random

import pytest
import torch
from captured import TOLERANCE, Graphs
from golden import relative_error
from models import adapted, tokens
from talk import Talk

from ahn import AHNCache
from ahn.cache.progress import Progress
from ahn.layout.anchors import anchor_moves


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much had been read each time that a device would have been waited for."""
    found: list[int] = []
    plain = Progress.padding

    def padding(progress: Progress) -> object:
        if progress._padding_behind:
            found.append(progress.seen)
        assert plain.fget is not None
        return plain.fget(progress)

    monkeypatch.setattr(Progress, "padding", property(padding, plain.fset))
    return found


def test_a_mask_makes_no_step_wait(asked: list[int], graphs: Graphs) -> None:
    """`generate` gives one at every step: transformers 5.24 does for padded prompts, 5.17 for any."""
    model = adapted(memory="deltanet", window=12, sinks=3, max_distance=32)
    cache, ids = AHNCache.for_model(model), tokens(1, 120)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        for n in range(40, 120):
            model(ids[:, n : n + 1], past_key_values=cache, attention_mask=torch.ones(1, n + 1))
    moves = anchor_moves(40, 120, model.ahn_config.reach)
    assert len(moves) == 10 and graphs.replays == 80
    assert len(asked) <= len(moves), asked


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_pause_while_their_sinks_move(seed: int) -> None:
    """The first pause may come right before a move, right after one, or long after the last padding was known."""
    draw = random.Random(seed)
    model = adapted(memory="deltanet", window=12, sinks=3, max_distance=32)
    talk = Talk(model, 2)
    talk.read([20, 20])
    talk.steps(draw.randrange(24))
    for _ in range(40):
        talk.read([1, 1] if draw.random() < 0.6 else draw.choice([[1, 0], [0, 1]]))
    for row, logits in zip(talk.rows, talk._logits, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row]), past_key_values=AHNCache.for_model(model)).logits[0]
        assert relative_error(torch.cat(logits), alone) < TOLERANCE


def test_a_pause_after_tokens_were_taken_out() -> None:
    """What was known of longer rows is no bound of shorter ones."""
    talk = Talk(adapted(memory="deltanet", window=12, sinks=3, max_distance=32), 1)
    talk.read([40])
    progress = talk.cache.progress
    assert isinstance(talk.cache, AHNCache)
    progress.crop(3)
    progress.finish_step(torch.tensor([37]), masked=True)
    assert progress.length_bounds() == (37, 38)
    assert progress.padding is not None and progress.padding.leading.tolist() == [1]

"""Kept states that requests go on from without a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from engines import SINKS, WINDOW, alone, ask, engine, model, prompt, request, whole
from models import adapted
from transformers import PreTrainedModel

from ahn import AHNCache
from ahn.serve.engine.batch import Batch, FixedBatch

OF = model(quantized=6)


@pytest.mark.sample(2)
@pytest.mark.parametrize("fixed, of", [(False, OF), (True, OF), (False, adapted("gemma3", window=WINDOW, sinks=SINKS))])
def test_a_state_that_is_gone_on_from_does_not_change(
    fixed: bool, of: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is lent: whoever reads on in chunks takes a copy, and a batch copies it into a row."""

    def batch(of: PreTrainedModel, rows: int, like: AHNCache) -> Batch:
        return FixedBatch(of, rows) if fixed else Batch(of)

    monkeypatch.setattr("ahn.serve.engine.scheduler.make_batch", batch)
    with engine(of) as running:
        first = ask(running, prompt(50), 4)
        kept = list(running.store._index)
        before = [(state, state.note.length, copy.deepcopy(state.cache.content()[0])) for state in kept if state.cache]
        forks = [[*prompt(50), *first.tokens, *prompt(n, seed=n)] for n in (1, 2, 30, 3)]
        got = [whole(reply) for reply in [running.submit(request(ids, 6)) for ids in forks]]
        for state, length, tensors in before:
            now = state.cache.content()[0]
            assert state.note.length == state.cache.seen == length and now.keys() == tensors.keys()
            assert all(torch.equal(x, tensors[name]) for name, x in now.items())
    assert [(one.cached, one.tokens) for one in got] == [(53, alone(of, ids, 6)) for ids in forks]

"""Kept states that requests go on from without a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from engines import SINKS, WINDOW, alone, ask, engine, model, prompt, request, whole
from models import adapted
from transformers import PreTrainedModel

from ahn import AHNCache
from ahn.cache.transfer import Transfer
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


def test_a_state_from_a_file_is_lent_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store keeps what was read, and the request goes on from the same: nothing is copied or changed."""
    copied: list[torch.Tensor] = []
    right = Transfer.copy

    def counted(self: Transfer, x: torch.Tensor) -> torch.Tensor:
        copied.append(x)
        return right(self, x)

    monkeypatch.setattr("ahn.serve.engine.scheduler.make_batch", lambda of, rows, like: FixedBatch(of, rows))
    with engine(OF, state_dir=tmp_path) as running:
        first = ask(running, prompt(50), 4)
        (kept,) = (state for state in running.store._index if state.file is not None)
        assert kept.cache is not None and kept.note.length == 53
        before, kept.cache = copy.deepcopy(kept.cache.content()[0]), None
        monkeypatch.setattr(Transfer, "copy", counted)
        for seed in range(2):
            ids = [*prompt(50), *first.tokens, *prompt(3, seed=seed)]
            got = ask(running, ids, 6)
            assert (got.cached, got.tokens) == (53, alone(OF, ids, 6))
            assert kept.cache is not None and not copied
            now = kept.cache.content()[0]
            assert now.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in now.items())
        assert running.store.open(kept) is not kept.cache and copied

"""The kernels of a step inside a model, interpreted: captured steps are ordinary ones over every edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import Graphs
from golden import relative_error
from models import awaken, base, give_bases
from support.kernels import INTERPRETED
from talk import Talk

import ahn
from ahn.cache import tier
from ahn.decode import runner
from ahn.layout.state import TierState

FORMS: dict[str, dict[str, Any]] = {
    "far tokens": {"memory": "gated_deltanet", "quantized": 9, "max_distance": 16},  # seven of nine are near
    "calibrated keys": {"quantized": 9, "max_distance": 16, "key_bits": 2, "calibrated_keys": True},
    "retained": {"memory": "retained", "max_distance": 32, "slots": 16, "key_bits": 16, "value_bits": 16},
}


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tests of its own, of whole conversations")
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("form", FORMS)
def test_steps_by_kernels_are_ordinary_ones(form: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    from ahn.ops.step import kernel, operator

    empty = tier.empty

    def with_wide_scales(*of: Any) -> TierState:
        state = empty(*of)
        for ring in (state.keys, state.values):
            ring.scales = ring.scales.float()
        return state

    # The interpreter cuts numbers off where a GPU rounds them to bfloat16.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    monkeypatch.setattr(tier, "empty", with_wide_scales)
    monkeypatch.setattr(operator, "step", lambda *of: kernel.step(*of, processors=1))
    config = ahn.AHNConfig(window=4, sinks=1, prefill_chunk_size=16, **FORMS[form])
    model = awaken(ahn.attach(base("qwen3", hidden_size=64, head_dim=32, num_hidden_layers=1), config))
    if config.calibrated_keys:
        give_bases(model)
    talks = [Talk(model, 1), Talk(model, 1)]
    with ahn.ops.use_backend("chunked"):
        for step in range(24):
            for talk, captured in zip(talks, (True, False), strict=True):
                monkeypatch.setattr(runner, "on_gpu", lambda ids, captured=captured: captured)
                talk.read((1,) if step else (3,))
            found, expected = (talk._logits[0][-1] for talk in talks)
            assert relative_error(found, expected) < 1e-5, step  # float32, in another order of operations
    assert graphs.replays == 23

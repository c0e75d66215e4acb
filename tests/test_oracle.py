"""The oracle itself, against the published implementation: what our own golden cases and tests rest on."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import torch
from golden import PUBLISHED, relative_error
from safetensors.torch import load_file

TOLERANCE = 1e-4  # the published numbers are float32


@torch.no_grad()
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published golden cases are not on this machine")
@pytest.mark.parametrize("folder", sorted(PUBLISHED.glob("*/")), ids=lambda folder: folder.name)
def test_oracle_is_the_published_implementation(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    weights = load_file(folder / "base.safetensors") | load_file(folder / "ahn.safetensors")
    weights = {name: x.double() for name, x in weights.items()}
    expected = load_file(folder / "expected.safetensors")
    ids, length = expected["input_ids"], case["prefill_length"]
    window, sinks = case["sliding_window"], case["num_attn_sinks"]
    logits, keys, states = oracle.decoder(case, weights, ids, window, sinks, (length,))
    assert relative_error(logits, expected["oneshot_logits"]) < TOLERANCE
    kept = [*range(sinks), *range(length - window, length)]
    for i, (key, (state,)) in enumerate(zip(keys, states, strict=True)):
        assert relative_error(key[:, :, kept], expected[f"cached_keys_after_prefill.{i}"]) < TOLERANCE
        state = state.mT if case["ahn"] == "Mamba2" else state
        assert relative_error(state, expected[f"state_after_prefill.{i}"]) < TOLERANCE

"""A slow start: what each head's state has left after a number of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import base

import ahn
from ahn.memory import RecurrentMemory
from ahn.memory.horizons import start_with_horizons
from ahn.training.arguments import parse
from ahn.training.run import load_model


@pytest.mark.parametrize("memory", ahn.memory.recurrent())
def test_heads_forget_by_an_e_fold_in_their_horizon(memory: str) -> None:
    model = ahn.attach(base(), ahn.AHNConfig(memory=memory, window=4, sinks=1))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    start_with_horizons(model, 50, 400)
    for layer in model.get_decoder().layers:
        fn = layer.ahn.fn
        assert isinstance(fn, RecurrentMemory)
        # The mean token: projections of x = 0 leave the biases.
        gates = fn.write_gates(torch.zeros(1, 1, fn.hidden_size))
        if "decay" not in gates:
            assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
            continue
        horizons = -1 / gates["decay"][0, :, 0]
        expected = torch.tensor([50.0, 100.0, 200.0, 400.0])  # four heads, evenly in the logarithm
        torch.testing.assert_close(horizons, expected, rtol=1e-4, atol=0)


def test_layers_that_keep_full_attention_have_nothing_to_start() -> None:
    model = ahn.attach(base(), ahn.AHNConfig(window=4, sinks=1, full_attention_layers=(0,)))
    start_with_horizons(model, 50, 400)
    assert not hasattr(model.get_decoder().layers[0], "ahn")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("flags", "ends"),
    [
        ([], (256.0, 16384.0)),
        (["--memory_horizons", "300,600"], (300.0, 600.0)),
        # Four heads with A = 1 … 4 and steps of softplus(1).
        (["--memory_horizons", "published"], (1 / 1.3132617, 1 / (4 * 1.3132617))),
    ],
)
def test_a_run_begins_so(flags: list[str], ends: tuple[float, float], tmp_path: Path) -> None:
    """`ahn train --memory_horizons`, or its default, reaches the memory before the first step."""
    words = ["--model_name_or_path", "ahn-tiny", "--dataset", "stdlib", "--use_cpu", "--output_dir", str(tmp_path)]
    settings, trainer = parse([*words, "--ahn_implementation", "Mamba2", *flags])
    fn = load_model(settings, trainer, ahn.tiny.path()).get_decoder().layers[-1].ahn.fn
    decay = fn.write_gates(torch.zeros(1, 1, fn.hidden_size))["decay"][0, :, 0]
    torch.testing.assert_close(-1 / decay[[0, -1]], torch.tensor(ends), rtol=1e-4, atol=0)

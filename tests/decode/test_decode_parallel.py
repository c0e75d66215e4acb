"""Captured steps under tensor parallelism: in each of two processes over its own heads, as ordinary ones."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from captured import LOSSLESS, SINKS, TOLERANCE, WINDOW, Graphs
from support.effort import slow
from support.processes import in_other_processes
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ahn

MEMORIES = {
    "gated_deltanet": 1, "deltanet": 1, "routed_deltanet": 1, "window_only": 1, "tier": 1, "mamba2": 0,
}  # fmt: skip
"""And how many graphs a conversation takes: the norm of Mamba2 waits for other processes, which no kernel does."""


def attached(folder: Path, memory: str) -> PreTrainedModel:
    """A model that lies in all processes, with a memory whose numbers are another one's in each, which is as good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    more: dict[str, Any] = {"memory": memory}
    if memory == "tier":
        more = {"quantized": 4, "key_bits": 2, "value_bits": 2, "keys_before_rope": False}
    return models.awaken(ahn.attach(model, ahn.AHNConfig(window=WINDOW, sinks=SINKS, **more)))


@torch.no_grad()
def steps(model: PreTrainedModel, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Logits of captured steps, and of ordinary ones with the same cache."""
    ids = models.tokens(rows, 30)
    cache = ahn.AHNCache.for_model(model)
    model(ids[:, :25], past_key_values=cache)
    other = copy.deepcopy(cache)
    found = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(25, 30)]
    labels = torch.ones(rows, 1, dtype=torch.long)  # a loss is wanted: no graph
    expected = [model(ids[:, n : n + 1], labels=labels, past_key_values=other).logits for n in range(25, 30)]
    return torch.cat(found, dim=1), torch.cat(expected, dim=1)


def saved(tmp_path: Path, architecture: str, **changes: Any) -> Path:
    models.base(architecture, vocab_size=62, **changes).save_pretrained(tmp_path / architecture)
    return tmp_path / architecture


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", slow("qwen2")])
def test_steps_are_captured_in_each_process(architecture: str, tmp_path: Path, graphs: Graphs) -> None:
    folder = saved(tmp_path, architecture)

    def share(rank: int) -> None:
        for memory, count in MEMORIES.items():
            before = graphs.captures
            found, expected = steps(attached(folder, memory))
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
            assert graphs.captures - before == count, memory

    assert LOSSLESS < 25
    assert in_other_processes(share, ranks=2) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", slow("qwen2")])
def test_layers_share_compiled_code(architecture: str, tmp_path: Path, compiled: list[torch.fx.Graph]) -> None:
    """One graph for all four layers, one each for the angles and the last norm. A layer has two sums over processes."""
    folder = saved(tmp_path, architecture, num_hidden_layers=4)

    def share(rank: int) -> None:
        model = attached(folder, "gated_deltanet")
        for rows in (1, 2):
            compiled.clear()
            found, expected = steps(model, rows)
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
            assert len(compiled) == 3
            calls = [str(node.target) for node in max(compiled, key=lambda graph: len(graph.nodes)).nodes]
            assert calls.count("_c10d_functional.all_reduce") == 2
            assert calls.count("ahn.product.default") == (4 if rows == 1 else 0)

    assert in_other_processes(share, ranks=2) == [0, 0]

"""Captured steps on a CPU, which has no graphs: each replay runs the step itself, over the buffers that a GPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captured import Graphs
from torch import Tensor
from transformers import PreTrainedModel

from ahn.decode import runner
from ahn.decode.compiled import layers_compiled


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Steps are captured on this machine too."""
    count = Graphs()

    def capture(model: PreTrainedModel, once: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        count.captures += 1
        with torch.inference_mode():  # as to a graph, it is all one to it
            for _ in range(2):
                once()
            logits = once()

        def replay() -> None:
            count.replays += 1
            with torch.inference_mode():
                logits.copy_(once())

        return replay, logits

    monkeypatch.setattr(runner, "capture", capture)
    monkeypatch.setattr(runner, "on_gpu", lambda ids: True)
    monkeypatch.setattr(runner, "supported", lambda *of: True)
    return count


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.Graph]]:
    """Captured steps run compiled, by a compiler that leaves our fusions as they are; the graphs that it was given."""
    found: list[torch.fx.Graph] = []

    def compile_graph(module: torch.fx.GraphModule, inputs: list[Tensor], options: Any) -> Callable[..., Any]:
        found.append(module.graph)
        return module.forward

    def capture(twin: PreTrainedModel, once: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def replay() -> Tensor:
            with layers_compiled(twin):
                return once()

        logits = replay()
        return lambda: logits.copy_(replay()), logits

    monkeypatch.setattr(torch._inductor, "compile", compile_graph)
    monkeypatch.setattr(runner, "capture", capture)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()

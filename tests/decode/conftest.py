"""Captured steps on a CPU, which has no graphs: each replay runs the step itself, over the buffers that a GPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captured import Graphs, on_this_machine
from torch import Tensor
from transformers import PreTrainedModel

from ahn.decode import runner
from ahn.decode.compiled import layers_compiled


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Steps are captured on this machine too."""
    return on_this_machine(monkeypatch)


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

"""Gradients of the distillation loss at forgotten tokens: the right ones, and nothing else is changed."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch

import ahn
from ahn.errors import AHNError
from ahn.evaluation import documents, gradient_probe, methods
from ahn.evaluation.methods import Evaluated
from ahn.training.distillation import distillation_loss

LENGTH, ANSWER = 60, 5
IDS = models.tokens(1, LENGTH)[0].tolist()
ONE_LAYER = {"num_hidden_layers": 1}


def adapted(**changes: int) -> ahn.model.adapter.PreTrainedModel:
    config = ahn.AHNConfig(memory="gated_deltanet", window=16, sinks=3)
    return models.awaken(ahn.attach(models.base(**changes), config))


@pytest.mark.slow
def test_a_gradient_is_what_the_loss_changes_by() -> None:
    """Each norm against finite differences along every axis of the embedding."""
    model = adapted().double()
    found = gradient_probe.probe(model, IDS, ANSWER)
    labels = torch.tensor([IDS])
    labels[:, : LENGTH - ANSWER] = -100
    batch = {"input_ids": torch.tensor([IDS]), "labels": labels}

    def loss(position: int, axis: int, step: float) -> float:
        def move(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            # The teacher is not moved: it runs first, and its loss target is fixed.
            calls.append(0)
            if len(calls) == 1:
                return output
            output = output.clone()
            output[0, position, axis] += step
            return output

        calls: list[int] = []
        handle = model.get_input_embeddings().register_forward_hook(move)
        try:
            with torch.no_grad():
                return float(distillation_loss(model, batch, 16, 3).loss)
        finally:
            handle.remove()

    step = 1e-3  # losses are float32 sums, exact to about 1e-7: a slope to 1e-4, of norms around 1e-2
    for position in (1, 10, 30, 50):
        slopes = [(loss(position, axis, step) - loss(position, axis, -step)) / (2 * step) for axis in range(32)]
        norm = sum(slope**2 for slope in slopes) ** 0.5
        assert norm == pytest.approx(found.norms[position], rel=0.05, abs=2e-4)


def test_forgotten_tokens_are_told_apart() -> None:
    found = gradient_probe.probe(adapted(), IDS, ANSWER)
    # The last position before the answer, 54, reads first; it sees 39 to 54.
    assert [found.regions.count(region) for region in ("sink", "remembered", "window")] == [3, 36, 21]
    assert found.regions[38] == "remembered" and found.regions[39] == "window"
    assert found.loss > 0


def test_without_a_memory_one_layer_forgets() -> None:
    """In one layer of sinks + window what has left cannot matter; the probe must find exactly zero there."""
    model = models.base(**ONE_LAYER)
    ahn.attach(model, ahn.AHNConfig(memory="window_only", window=16, sinks=3))
    found = gradient_probe.probe(model, IDS, ANSWER)
    remembered = [norm for norm, region in zip(found.norms, found.regions, strict=True) if region == "remembered"]
    assert set(remembered) == {0.0}
    assert all(norm > 0 for norm, region in zip(found.norms, found.regions, strict=True) if region == "sink")
    with_memory = gradient_probe.probe(adapted(**ONE_LAYER), IDS, ANSWER)
    assert min(with_memory.norms[:-1]) > 0 == with_memory.norms[-1]  # nothing is predicted from the last token


def test_the_model_is_left_as_it_was() -> None:
    model = adapted()
    flagged = next(iter(ahn.adapter_parameters(model).values()))
    flagged.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradient_probe.probe(model, IDS, ANSWER)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_errors() -> None:
    with pytest.raises(AHNError, match="full"):
        gradient_probe.probe(models.base(), IDS, ANSWER)
    with pytest.raises(AHNError, match=r"19 \+ 41"):
        gradient_probe.probe(adapted(), IDS, 41)
    gradient_probe.probe(adapted(), IDS, 40)
    with pytest.raises(AHNError):
        gradient_probe.probe(adapted(), IDS, 0)


class Letters:
    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [f"<{token}>" for (token,) in rows]


def test_a_result_folder(tmp_path: Path) -> None:
    model = adapted()
    described = methods.describe(model, "ahn") | {"model": "random"}
    evaluated = Evaluated(model, Letters(), "ahn", described, {})  # type: ignore[arg-type]
    result = gradient_probe.run(evaluated, documents.LongDocument("book", "abc", IDS), tmp_path, ANSWER)
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "gradients.jsonl").read_text().splitlines()]
    assert [row["token"] for row in rows] == [f"<{token}>" for token in IDS]
    assert [row["norm"] for row in rows] == gradient_probe.probe(model, IDS, ANSWER).norms
    assert result == json.loads((folder / "result.json").read_text())
    assert result["remembered"] == 36 and result["task"] == "gradients"

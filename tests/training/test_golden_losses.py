"""Training losses and gradients of the published implementation, to 1e-4 relative.

Its two quirks are given as an explicit mask of positions: its KL counts the last position, which predicts nothing; its
cross entropy keeps positions ≥ T, flattens and shifts inside that list, which for one sequence is our own rule.
"""

from __future__ import annotations

import pytest
import torch
from golden import CASES, Case, golden_error, load_case
from golden import name as case_name
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.training.losses import Head, hidden_losses, next_tokens, valid_positions

TOLERANCE = 1e-4  # float32 against float32 in another order of operations (docs/spec.md, section 9)


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.get_decoder()(ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", ["kl", "ce"])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_and_gradients(case: Case, name: str) -> None:
    model, _, expected = load_case(case)
    ids = expected["input_ids"][:, : case["prefill_length"]]
    ahn.set_window(model, case["train_window"], case["train_sinks"])
    lossless = case["train_window"] + case["train_sinks"]
    with ahn.disabled(model), torch.no_grad():
        teacher = hidden_states(model, ids)
    student = hidden_states(model, ids)

    assert case["batch"] == 1
    targets = next_tokens(ids)
    if name == "kl":
        positions = (torch.arange(ids.shape[1]) >= lossless)[None]
        targets = targets.clamp_min(0)  # the last position needs some target for the cross entropy, which is not read
    else:
        positions = valid_positions(targets, lossless)
    found = hidden_losses(
        student, teacher, targets, positions, Head.of(model), float(name == "kl"), float(name == "ce"), chunk=10
    )
    found.loss.backward()
    assert golden_error(found.loss.detach()[None], expected[f"train_{name}_loss"]) < TOLERANCE

    parameters = ahn.adapter_parameters(model)
    prefix = f"grad_{name}."
    golden = {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}
    assert golden, "the case holds no gradients"
    # Mamba2 and DeltaNet use every parameter; GatedDeltaNet's D is in checkpoints only.
    assert {key for key, p in parameters.items() if p.grad is not None} <= set(golden)
    errors = {key: golden_error(parameters[key].grad, value) for key, value in golden.items()}
    assert max(errors.values()) < TOLERANCE, errors

"""The training loop: it learns, changes nothing but the adapter, stops at what is not finite, and repeats exactly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_student import scaled_head, student, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.training import WindowSchedule

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

from stages.loop import StepLog, distill, learning_rate_factor

FIXED = WindowSchedule(sliding_window_type="fixed", total=10, ahn_position="prefix")
RANDOM = WindowSchedule(totals=(8, 16), sink_candidates=(0, 4), seed=1)


def adapter(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in ahn.adapter_parameters(model).items()}


@pytest.mark.sample(1)
@pytest.mark.parametrize("memory", ahn.memory.recurrent())
def test_thirty_steps_lower_the_divergence(memory: str) -> None:
    model = student(trained=False, memory=memory)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if name not in adapter(model)}
    ids = tokens(4, 48)
    logs = distill(model, [ids] * 30, 30, FIXED, lr=1e-2)
    assert logs[-1].kl < 0.8 * logs[0].kl
    assert [log.step for log in logs] == list(range(30))
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_sequences_begin_where_the_schedule_says() -> None:
    """For the teacher and for the student; without positions nothing is said, and the model counts from 0."""
    for positions in (0, 900):
        schedule = WindowSchedule(totals=(8, 16), sink_candidates=(0, 4), positions=positions)
        model, seen = student(memory="routed_deltanet"), []
        model.get_decoder().register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(given.get("position_ids")), with_kwargs=True
        )
        distill(model, [tokens(2, 40)] * 3, 3, schedule)
        starts = [schedule.draw(step, 40).start for step in range(3) for _ in ("teacher", "student")]
        told = [None if x is None else x.tolist() for x in seen[-6:]]
        assert told == [[list(range(start, start + 40))] if start else None for start in starts]
        assert (len(set(starts)) == 3) == bool(positions)


def test_the_model_is_given_back_as_it_was() -> None:
    model = student()
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = adapter(model)
    logs = distill(model, [tokens(2, 40)] * 3, 3, RANDOM)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.ahn_config.window == 8 and model.ahn_config.sinks == 2
    assert not model.training
    assert [(log.window, log.sinks) for log in logs] == [tuple(RANDOM.draw(step, 40)[:2]) for step in range(3)]
    changed = {name for name, p in adapter(model).items() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.endswith("fn.D")}


def test_logging_less_often_changes_no_number() -> None:
    found: list[list[StepLog]] = []
    weights = []
    for log_every in (1, 3):
        model, seen = student(), []
        batches = (tokens(2, 40, seed=step) for step in range(7))
        found.append(distill(model, batches, 7, RANDOM, lr=1e-2, log_every=log_every, on_step=seen.append))
        assert seen == found[-1]
        weights.append(adapter(model))
    assert found[0] == found[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("log_every", [1, 5])
def test_not_a_number_stops_before_harm(log_every: int) -> None:
    """Whenever the loss is read, the adapter is as it was before the bad step."""
    model, before = student(), {}
    norm = model.get_decoder().norm.weight

    def batches() -> Iterator[Tensor]:
        for step in range(9):
            if step == 2:
                before.update(adapter(model))
                norm.data[0] = torch.nan
            elif step == 3:
                norm.data[0] = 1.0  # later good steps must not train on either
            yield tokens(1, 40, seed=step)

    with pytest.raises(ahn.AHNError, match="Step 2"):
        distill(model, batches(), 9, RANDOM, log_every=log_every)
    assert all(torch.equal(p, before[name]) for name, p in adapter(model).items())
    assert all(p.requires_grad for p in model.parameters())


def test_bf16_autocast_learns_too() -> None:
    model = student(trained=False)
    exact = distill(student(trained=False), [tokens(4, 48)], 1, FIXED)[0].kl
    logs = distill(model, [tokens(4, 48)] * 15, 15, FIXED, lr=1e-2, bf16=True)
    # Rounded, so not the same; factors of 2^-9 relative through two layers stay well under 10 %.
    assert logs[0].kl != exact and logs[0].kl == pytest.approx(exact, rel=0.1)
    assert logs[-1].kl < logs[0].kl
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_weight_decay_is_of_matrices_alone() -> None:
    """A learning rate of 1 and a decay of 0.5 would halve a vector at once; AdamW's own step is at most 1."""
    kept = []
    for decay in (0.0, 0.5):
        model = student()
        distill(model, [tokens(1, 40)], 1, FIXED, lr=1.0, weight_decay=decay)
        kept.append(adapter(model))
    for name, parameter in kept[0].items():
        assert torch.equal(parameter, kept[1][name]) == (parameter.dim() == 1), name


def test_learning_rate() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert learning_rate_factor(0, 1, 0.1) == 1


def test_wrong_arguments_are_refused() -> None:
    model, ids = student(), tokens(1, 40)
    with pytest.raises(ahn.AHNError, match="ended after 1 of 2 steps"):
        distill(model, [ids], 2, FIXED)
    with pytest.raises(ahn.AHNError, match="at least 1"):
        distill(model, [ids], 0, FIXED)
    with pytest.raises(ahn.AHNError, match="choose from"):
        distill(model, [ids], 1, FIXED, loss="mse")
    with pytest.raises(ahn.AHNError, match="float32"):
        distill(model.bfloat16(), [ids], 1, FIXED)
    with pytest.raises(ahn.AHNError, match="nothing to train"):
        distill(student(memory="window_only"), [ids], 1, FIXED)
    with pytest.raises(ahn.AHNError, match="GraniteForCausalLM"):
        distill(scaled_head(), [ids], 1, FIXED)
    with pytest.raises(ahn.AHNError, match="no AHN"):
        distill(ahn.detach(model), [ids], 1, FIXED)


# -- on a GPU


@pytest.mark.parametrize("memory", ahn.memory.recurrent())
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_wait_between_logs(memory: str) -> None:
    model = student(memory=memory).cuda()
    schedule = WindowSchedule(sliding_window_type="fixed", total=10, ahn_position="prefix")

    def batches() -> Iterator[Tensor]:
        for step in range(6):
            # The first steps compile kernels and allocate; the last is followed by the read of the losses.
            torch.cuda.set_sync_debug_mode("warn" if step in (3, 4) else "default")
            yield tokens(2, 96, seed=step)

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logs = distill(model, batches(), 6, schedule, log_every=6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(logs) == 6
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    # transformers asks once a forward whether samples are packed; nothing else may wait.
    assert [wait for wait in waits if "masking_utils.py" not in wait] == []
    assert len(waits) <= 2 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_not_a_number_stops_before_harm_on_a_gpu() -> None:
    model, before = student().cuda(), {}
    norm = model.get_decoder().norm.weight

    def batches() -> Iterator[Tensor]:
        for step in range(6):
            if step == 2:
                before.update({name: p.detach().clone() for name, p in ahn.adapter_parameters(model).items()})
                norm.data[0] = torch.nan
            yield tokens(1, 96, seed=step)

    schedule = WindowSchedule(sliding_window_type="fixed", total=10, ahn_position="prefix")
    with pytest.raises(ahn.AHNError, match="Step 2"):
        distill(model, batches(), 6, schedule, log_every=6)
    assert all(torch.equal(p, before[name]) for name, p in ahn.adapter_parameters(model).items())

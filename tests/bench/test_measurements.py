"""Every measurement of every kind of method gives a row whose numbers agree with each other. No time is asserted."""

from __future__ import annotations

import dataclasses
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ahn
from ahn.bench import ceilings, decode, memory, prefill, profile, train
from ahn.bench.methods import make_methods
from ahn.bench.stand import BenchSettings, Skipped, Stand
from ahn.errors import AHNError
from ahn.measure import clock

NAMES = ["full-dynamic", "full-static", "window", "gated_deltanet"]


def measured(module: Any, stand: Stand, name: str, context: int = 70, batch: int = 2) -> dict[str, Any]:
    method = make_methods([name], 20, 4)[0]
    with method.on(stand.model), method.without_gradients():
        return module.measure(stand, method, context, batch)


def check_roofline(row: dict[str, Any], tokens: int) -> None:
    assert row["share"] == pytest.approx(row["limit_s"] / row["seconds"])
    assert row["limit_s"] == pytest.approx(max(row["bytes"] / 1e12, row["flops"] / 1e14))
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])


@pytest.mark.parametrize("name", NAMES)
def test_prefill(stand: Stand, name: str) -> None:
    row = measured(prefill, stand, name)
    assert len(row["times_s"]) == 2
    assert row["seconds"] == statistics.median(row["times_s"])
    assert row["peak_bytes"] is None or row["peak_bytes"] >= stand.held()
    check_roofline(row, 2 * 70)


@pytest.mark.parametrize("name", NAMES)
def test_decode(stand: Stand, name: str) -> None:
    row = measured(decode, stand, name)
    assert "generate_why" not in row
    assert len(row["generate_times_s"]) == 2
    assert ("times_s" in row) == (name != "full-static")  # which has no step of its own
    assert row["cache_bytes"] > 0
    check_roofline(row, 2)


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_from_the_context(stand: Stand, name: str) -> None:
    method = make_methods([name], 20, 4)[0]
    with method.on(stand.model), method.without_gradients():
        cache, _ = decode.prepare(stand, method, 70, 2)
        decode.generate(stand, cache, torch.zeros(2, 1, dtype=torch.long), 4)
    assert int(cache.get_seq_length()) == 74  # 4 tokens were read: the given one, and 3 of its own


def test_decode_after_really_reading(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Stand(stand.model, stand.ceilings, BenchSettings(new_tokens=2, repeats=1, real_prefill=True))
    monkeypatch.setattr("ahn.bench.fill.synthetic_cache", None)
    assert measured(decode, real, "mamba2")["cache_bytes"] == pytest.approx(
        measured(decode, real, "mamba2", context=140)["cache_bytes"]
    )


def test_a_generate_that_fails_does_not_take_the_step_with_it(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(decode, "generate", fail)
    row = measured(decode, stand, "mamba2")
    assert "no such kernel" in row["generate_why"]
    assert row["seconds"] > 0


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NAMES)
def test_memory(stand: Stand, name: str) -> None:
    row = measured(memory, stand, name)
    assert row["weights_bytes"] >= stand.held()
    if row["peak_bytes"] is not None:
        assert row["peak_bytes"] == max(row["prefill_peak_bytes"], row["decode_peak_bytes"])


@pytest.mark.parametrize("name", NAMES)
def test_throughput(stand: Stand, name: str) -> None:
    row = measured(SimpleNamespace(measure=decode.throughput), stand, name, batch=3)
    assert ("generate_s" in row) == (name == "full-static")
    check_roofline(row, 3)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", ahn.memory.recurrent())
@pytest.mark.sample(2)
def test_train(stand: Stand, name: str, checkpointing: bool) -> None:
    stand = dataclasses.replace(
        stand, settings=dataclasses.replace(stand.settings, activation_checkpointing=checkpointing)
    )
    method, model = make_methods([name], 20, 4)[0], stand.model
    forwards: list[bool] = []
    layer = model.get_decoder().layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    with method.on(model, training=True):
        row = train.measure(stand, method, 70, 2)
    handle.remove()
    steps = 1 + len(row["times_s"]) + 3  # the first warms up; the last are looked at by phase, two of them short
    # Teacher, student, and where layers have kept nothing the student again in the backward pass.
    assert len(forwards) == (3 if checkpointing else 2) * steps
    assert list(row["phases_s"]) == list(row["host_phases_s"]) == ["teacher", "student", "losses", "backward"]
    assert 0 < sum(row["host_phases_s"].values()) < 10 and min(row["phases_s"].values()) > 0
    assert row["activation_checkpointing"] is checkpointing
    assert row["loss_positions"] == 2 * (70 - 24 - 1)
    check_roofline(row, 2 * 70)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("module", [prefill, decode, train])
def test_kernels(stand: Stand, module: Any) -> None:
    profiling = Stand(stand.model, stand.ceilings, BenchSettings(repeats=1, profile=True, new_tokens=4))
    method = make_methods(["gated_deltanet"], 20, 4)[0]
    with method.on(stand.model, training=module is train):
        row = module.measure(profiling, method, 70, 1)
    times = [kernel["adds_ms"] for kernel in row["kernels"][:-1]]  # the last one may sum all others
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert any("mm" in kernel["name"] for kernel in row["kernels"])
    text = profile.table(row["kernels"], row["seconds"])
    assert len(text.splitlines()) == len(row["kernels"]) + 2


def test_what_overlapping_kernels_add() -> None:
    ran = [("a", 0.0, 10.0), ("b", 4.0, 13.0), ("a", 15.0, 16.0), ("b", 15.5, 15.75)]
    found = {kernel["name"]: kernel for kernel in profile.summed(ran[::-1])}
    assert found["a"] == {"name": "a", "ms": 0.011, "adds_ms": 0.011, "calls": 2}
    assert found["b"] == pytest.approx({"name": "b", "ms": 0.00925, "adds_ms": 0.003, "calls": 2})


def test_what_cannot_be_trained(stand: Stand) -> None:
    with pytest.raises(AHNError, match="window has no parameters"):
        train.measure(stand, make_methods(["window"], 20, 4)[0], 70, 1)


@pytest.mark.parametrize("module", [prefill, memory])
def test_patience(stand: Stand, module: Any) -> None:
    hasty = Stand(stand.model, stand.ceilings, BenchSettings(max_seconds=1e-12))
    with pytest.raises(Skipped, match="at least"):
        measured(module, hasty, "full-dynamic")


def test_repetitions_end_with_the_budget() -> None:
    device = torch.device("cpu")
    assert len(clock.repeated(device, lambda: None, times=3, budget=60)) == 3
    assert len(clock.repeated(device, lambda: None, times=3, budget=0)) == 1


def test_ceilings_are_rates_of_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "REPEATS", 3)
    found = ceilings.measure(torch.device("cpu"), torch.float32)
    assert found.bytes_per_second == pytest.approx(2 * found.copied_bytes / statistics.median(found.copy_times))
    assert found.flops_per_second == pytest.approx(2 * found.matmul_size**3 / statistics.median(found.matmul_times))
    assert min(len(found.copy_times), len(found.matmul_times)) >= 1

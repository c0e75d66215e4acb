"""A run that is killed and resumed ends with the same bits as one that was not; broken checkpoints are left aside."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import in_other_processes
from tiny_run import flags, words, write_rows

import ahn
from ahn.training import checkpoints
from ahn.training.arguments import parse
from ahn.training.run import run, starting_point
from ahn.training.student import Student

pytest.importorskip("transformers", minversion="5.23")  # as the `train` extra asks for

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven texts: with two a step, an epoch ends within a step, and eight steps are more than two epochs."""
    rows = [{"text": words(60 + 20 * n, n)} for n in range(7)]
    return write_rows(tmp_path_factory.mktemp("data") / "seven.jsonl", rows)


def train(tiny_model: Path, data: Path, output: Path, before: Callable[[], None] | None = None, **more: object) -> int:
    def child(rank: int) -> None:
        if before is not None:
            before()
        settings = {"max_steps": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, **more}
        run(parse(flags(tiny_model, data, output, **settings)))

    return in_other_processes(child)[0]


def die_in_micro_batch(number: int) -> Callable[[], None]:
    def arm() -> None:
        forward, calls = Student.forward, []

        def counted(self, part):  # type: ignore[no-untyped-def]
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(self, part)

        Student.forward = counted  # type: ignore[method-assign]

    return arm


def die_while_writing(step: int) -> Callable[[], None]:
    def arm() -> None:
        write = checkpoints.write_rng

        def interrupted(path: Path, rank: int) -> None:
            if f"-{step}." in path.name:
                (path / checkpoints.RNG.format(rank)).write_bytes(b"\x10")
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, rank)

        checkpoints.write_rng = interrupted

    return arm


def contents(output: Path) -> dict[str, bytes]:
    """Weights in float32, optimizer, schedule and random state at the end, and the finished adapter."""
    last = output / "checkpoint-8"
    names = ("model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "training.json")
    return {name: (last / name).read_bytes() for name in names} | {"final": (output / "model.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole")
    assert train(tiny_model, data, output) == 0
    return contents(output)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("break_it", "good"),
    [
        pytest.param(die_in_micro_batch(3), None, id="before the first checkpoint"),
        pytest.param(die_in_micro_batch(10), 4, id="in the middle of a step"),
        pytest.param(die_in_micro_batch(15), 6, id="in the last step"),
        pytest.param(die_while_writing(6), 4, id="while a checkpoint is written"),
    ],
)
def test_killed_and_resumed(
    break_it: Callable[[], None],
    good: int | None,
    tiny_model: Path,
    data: Path,
    tmp_path: Path,
    uninterrupted: dict[str, bytes],
) -> None:
    assert train(tiny_model, data, tmp_path, break_it) == KILLED
    found = checkpoints.last_good(tmp_path)
    assert found == (None if good is None else tmp_path / f"checkpoint-{good}")
    assert train(tiny_model, data, tmp_path, resume_from_checkpoint=True) == 0
    assert contents(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_base_in_bfloat16_resumes_in_float32(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """`load_adapter` would round the memory to the base's precision."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(tiny_model, data, whole, bf16=True) == 0
    assert train(tiny_model, data, broken, die_in_micro_batch(10), bf16=True) == KILLED
    assert train(tiny_model, data, broken, bf16=True, resume_from_checkpoint=True) == 0
    assert contents(broken) == contents(whole)
    memory = checkpoints.Checkpoint.open(whole / "checkpoint-8").ahn_tensors.values()
    assert {entry.dtype for entry in memory} == {"F32"}
    assert {entry.dtype for entry in checkpoints.Checkpoint.open(whole).ahn_tensors.values()} == {"BF16"}


def finished(tiny_model: Path, data: Path, output: Path) -> Path:
    assert train(tiny_model, data, output, max_steps=4) == 0
    return output


def test_damaged_checkpoints_are_left_aside(
    tiny_model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = finished(tiny_model, data, tmp_path)
    weights = output / "checkpoint-4" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_good(output) == output / "checkpoint-2"
    assert "checkpoint-4 is left aside" in caplog.text
    (output / "checkpoint-2" / "trainer_state.json").unlink()
    assert checkpoints.last_good(output) is None
    with pytest.raises(ahn.AHNError, match=r"Cannot resume from .*trainer_state"):
        point(tiny_model, data, output, resume_from_checkpoint=output / "checkpoint-2")


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    """Of one that was damaged and left aside, or that came after the one a run was resumed from by name."""
    old, new = checkpoints.folder(tmp_path, 2), checkpoints.partial(tmp_path, 2)
    for path in (old, new):
        path.mkdir()
        (path / "file").write_text(path.name)
    checkpoints.remove([old])
    assert not old.exists() and (new / "file").read_text() == new.name
    (tmp_path / ".checkpoint-2.old.partial").mkdir()  # as a run leaves it that is killed amid the removal
    checkpoints.clear_partial(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_writes_over_later_checkpoints(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    output = finished(tiny_model, data, tmp_path)
    (output / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"damaged")
    settings = {"resume_from_checkpoint": output / "checkpoint-2", "max_steps": 4}
    assert train(tiny_model, data, output, **settings) == 0
    assert checkpoints.damage(output / "checkpoint-4") is None


def point(tiny_model: Path, data: Path, output: Path, **more: object) -> Path | None:
    return starting_point(*parse(flags(tiny_model, data, output, **more)))


@pytest.mark.slow
def test_where_a_run_starts(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    assert point(tiny_model, data, tmp_path) is None
    assert point(tiny_model, data, tmp_path, resume_from_checkpoint=True) is None, "a first try of a restarted job"
    output = finished(tiny_model, data, tmp_path)
    with pytest.raises(ahn.AHNError, match="holds an earlier run"):
        point(tiny_model, data, output)
    assert point(tiny_model, data, output, resume_from_checkpoint=True) == output / "checkpoint-4"
    named = point(tiny_model, data, output, resume_from_checkpoint=output / "checkpoint-2")
    assert named == output / "checkpoint-2"
    assert point(tiny_model, data, output, overwrite_output_dir=True) is None
    assert not checkpoints.numbered(output), "an old run's later checkpoints must not be resumed from"


@pytest.mark.slow
def test_another_memory_is_not_resumed(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    output = finished(tiny_model, data, tmp_path)
    model = ahn.attach(_base(tiny_model), ahn.AHNConfig(memory="mamba2"))
    with pytest.raises(ahn.AHNError, match="another memory"):
        checkpoints.load_memory(model, output / "checkpoint-4")


def _base(path: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.slow
def test_old_checkpoints_go(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    assert train(tiny_model, data, tmp_path, save_total_limit=2) == 0
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-8", "checkpoint-6"]
    assert not list(tmp_path.glob(".checkpoint-*"))

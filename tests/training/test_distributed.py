"""Two processes on one CPU train what one does with the same global batch: DDP, and weights sharded by FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from support.effort import slow
from support.processes import in_other_processes
from tiny_run import flags
from torch import Tensor
from torch.distributed.tensor import DTensor

import ahn.training.run
from ahn.decode.compiled import leaves_compiled
from ahn.training.arguments import parse
from ahn.training.run import run
from ahn.training.student import Student


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logged(folder: Path) -> list[tuple[float, ...]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "kl", "ce", "window", "sinks", "eval_kl")
    return [
        tuple(entry[name] for name in names if name in entry) for entry in history if {"kl", "eval_kl"} & set(entry)
    ]


def shard_on_a_cpu() -> None:
    """accelerate leaves FSDP out where there is no GPU, though torch's FSDP2 works there (gloo). For this process."""
    initialise = AcceleratorState.__init__

    def patched(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, four micro-batches a step."""
    output = tmp_path_factory.mktemp("alone")

    def train(rank: int) -> None:
        run(parse(flags(tiny_model, tiny_data, output, gradient_accumulation_steps=4, val_size=5)))

    assert in_other_processes(train) == [0]
    return output


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("sharded", "compiled"), [(False, False), (True, False), slow(True, True)], ids=["ddp", "fsdp2", "fsdp2 compiled"]
)
def test_two_processes_equal_one(
    sharded: bool, compiled: bool, alone: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Rows are 50 to 128 tokens long, and totals up to 64 are drawn: some micro-batches have few positions or none."""
    more = {"fsdp": True, "activation_checkpointing": True} if sharded else {}

    def train(rank: int) -> None:
        shard_on_a_cpu()
        if compiled:
            ahn.training.run.leaves_fused = leaves_compiled  # otherwise on GPUs only
        seen = []
        forward = Student.forward

        def watched(self: Student, part):  # type: ignore[no-untyped-def]
            layer = next(iter(self.layers()))
            seen.append(isinstance(next(layer.self_attn.parameters()), DTensor))
            return forward(self, part)

        Student.forward = watched  # type: ignore[method-assign]
        arguments = flags(
            tiny_model, tiny_data, tmp_path, gradient_accumulation_steps=2, val_size=5, ddp_backend="gloo", **more
        )
        run(parse(arguments))
        assert seen and all(found == sharded for found in seen), "the base's weights must lie in parts, or must not"
        torch.distributed.destroy_process_group()

    assert in_other_processes(train, ranks=2, timeout=600) == [0, 0]
    found, expected = weights(tmp_path), weights(alone)
    assert any(tensor.any() for name, tensor in expected.items() if name.endswith("o_proj.weight"))
    for name, tensor in expected.items():
        # The same float32 sums in another order, over four steps of a learning rate of 1e-2.
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    # The log rounds to six digits.
    for ours, theirs in zip(logged(tmp_path), logged(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)

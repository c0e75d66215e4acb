"""Training on one GPU and on all: tokens/s, and whether the losses are the same. DDP, or weights divided by FSDP2.

What is trained is `ahn.training.student.Student`, the module that `ahn train` gives to DDP or FSDP2, with its optimiser
and clipping; files, data and checkpoints play no part. Weights are random, and so are the tokens; the batch is the same
in every step, so that the loss must fall.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from place import Place
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import ahn
from ahn.decode.compiled import leaves_fused
from ahn.measure.clock import release, synchronize
from ahn.measure.peak import so_far
from ahn.training.student import MicroBatch, Student

INIT_STD = 0.02
WARMUP = 2
"""First steps that are not timed."""
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and its samples.

    Attributes:
        base: a causal language model with random weights on a device, or on "meta" with none.
        samples: a step and GPU, each of `length` tokens.
    """

    base: Callable[[torch.device], PreTrainedModel]
    config: ahn.AHNConfig
    length: int
    samples: int
    steps: int


@dataclasses.dataclass
class Found:
    """What one training measured; the same on every rank that took part."""

    losses: list[float]
    tokens_per_second: float
    first_step_s: float
    peak_gib: list[float]
    """Of each rank."""


def replicas(work: Work, place: Place) -> dict[str, Any]:
    """Each GPU alone, all at the same time, with the batch of all; then all with DDP."""
    student, alone = trained_alone(work, place)
    devices = [place.device] if place.device.type == "cuda" else None
    wrapped = DistributedDataParallel(student, device_ids=devices)
    return compared(alone, train(wrapped, student, work, place, place.ranks, wrapped.no_sync))


def shares(work: Work, place: Place) -> dict[str, Any]:
    """Each GPU alone, all at the same time, with the batch of all; then the same weights divided by FSDP2."""
    student, alone = trained_alone(work, place)
    divide(student, place)
    release(place.device)
    return compared(alone, train(student, student, work, place, place.ranks, contextlib.nullcontext))


def never_whole(work: Work, place: Place) -> dict[str, Any]:
    """FSDP2 of a model of which no process ever holds more than its share of the weights and one layer."""
    student = ready(work.base(torch.device("meta")), work)
    divide(student, place)
    student.to_empty(device=place.device)
    decoder = student.model.get_decoder()
    with place.device:
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
    torch.manual_seed(place.rank)  # every share has its own numbers
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if ".ahn." not in name:
                _initialise(name, parameter.to_local())
        torch.manual_seed(0)
        for layer in student.layers():
            _draw_memory(layer.ahn.fn, place.device)
    found = train(student, student, work, place, place.ranks, contextlib.nullcontext)
    return dataclasses.asdict(found) | {"fell_by": 1 - found.losses[-1] / found.losses[0]}


def trained_alone(work: Work, place: Place) -> tuple[Student, Found]:
    """One training in each process, and the student as it was before."""
    student = ready(work.base(place.device), work)
    memory = {name: x.detach().clone() for name, x in student.memory().items()}
    alone = train(student, student, work, place.alone(), place.ranks, contextlib.nullcontext)
    with torch.no_grad():
        for name, x in student.memory().items():
            x.copy_(memory[name])
    place.barrier()
    return student, alone


def compared(alone: Found, together: Found) -> dict[str, Any]:
    """One GPU and all."""
    apart = max(abs(a - b) for a, b in zip(alone.losses, together.losses, strict=False))
    return {
        "one": dataclasses.asdict(alone),
        "all": dataclasses.asdict(together),
        "ratio": together.tokens_per_second / alone.tokens_per_second,
        "largest_difference_of_losses": apart,
        "relative": apart / min(alone.losses),
        "fell_by": 1 - alone.losses[-1] / alone.losses[0],
    }


def divide(student: Student, place: Place) -> None:
    """FSDP2 layer by layer, as `ahn train` has it."""
    mesh = init_device_mesh(place.device.type, (place.ranks,))
    for layer in student.layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)


def _draw_memory(fn: Any, device: torch.device) -> None:
    with device:
        fresh = dict(type(fn)(fn.hidden_size, fn.heads, fn.head_dim, fn.kv_heads).named_parameters())
    for name, parameter in fn.named_parameters():
        whole = distribute_tensor(fresh[name].float(), parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(whole.to_local())


def _initialise(name: str, share: Tensor) -> None:
    if name.endswith("bias"):
        share.zero_()
    elif "norm" in name:
        share.fill_(1)
    else:
        share.normal_(std=INIT_STD)


def ready(model: PreTrainedModel, work: Work) -> Student:
    """Teacher and student, whose layers keep nothing."""
    torch.manual_seed(0)
    student = Student(ahn.attach(model, work.config))
    with warnings.catch_warnings():  # a newer name exists, which older versions of transformers lack
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return student.train()


def train(
    module: nn.Module,
    student: Student,
    work: Work,
    place: Place,
    gpus: int,
    unsynchronised: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Found:
    """Optimiser steps on one batch.

    Args:
        module: the student as it is called.
        gpus: for as many is the batch, whoever trains.
        unsynchronised: inside this block a backward pass keeps its gradients to itself.
    """
    batch = _batch(work, student, gpus)
    own = batch[place.rank :: place.ranks]
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    losses: list[float] = []
    times: list[float] = []
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    with leaves_fused(student.model):
        while len(losses) < work.steps and not (len(losses) > WARMUP and place.late()):
            synchronize(place.device)
            start = time.perf_counter()
            loss = torch.zeros((), device=place.device)
            for number, part in enumerate(own):
                with unsynchronised() if number < len(own) - 1 else contextlib.nullcontext():
                    found = module(part)
                    (found.loss * place.ranks).backward()  # gradients are averaged over ranks
                loss += found.loss.detach()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if place.ranks > 1:
                dist.all_reduce(loss)
            losses.append(loss.item())
            times.append(time.perf_counter() - start)
            place.say(gpus=place.ranks, step=len(losses), loss=losses[-1], seconds=times[-1])
    seconds = statistics.median(times[WARMUP:] or times)
    speed = len(batch) * work.length / seconds
    return Found(losses, speed, times[0], place.of_all(so_far() / 2**30))


def _batch(work: Work, student: Student, gpus: int) -> list[MicroBatch]:
    """Samples, each a micro-batch; the losses of all of them are one mean."""
    generator = torch.Generator().manual_seed(0)
    number, config = work.samples * gpus, student.model.ahn_config
    ids = torch.randint(student.model.config.vocab_size, (number, 1, work.length), generator=generator)
    count = number * (work.length - config.lossless - 1)
    return [MicroBatch({"input_ids": row}, config.window, config.sinks, count) for row in ids]

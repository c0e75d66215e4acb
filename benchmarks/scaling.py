"""Training on one GPU and on all: tokens/s, and whether the losses are the same. Or with weights divided by FSDP2.

    torchrun --nproc_per_node 2 benchmarks/scaling.py                                    # DDP, the 3B shape
    torchrun --nproc_per_node 2 benchmarks/scaling.py --sharded --model qwen2.5-14b --steps 4

Random weights in the real shape and random tokens. What is trained is `ahn.training.student.Student`, the module that
`ahn train` gives to DDP or FSDP2, with its optimiser and clipping; files, data and checkpoints play no part. Without
`--sharded` the first process trains alone while the others wait, then all of them train the same model on the same
batch, divided between them. The batch is the same in every step, so that the loss must fall.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import ahn
from ahn.bench.shapes import SHAPES, configuration
from ahn.decode.compiled import leaves_fused
from ahn.measure.clock import release, synchronize
from ahn.measure.peak import so_far
from ahn.training.student import MicroBatch, Student

INIT_STD = 0.02
SHARP = 3.0
"""Queries of random weights are made this much longer: attention that singles tokens out is what a window cuts off."""


@dataclasses.dataclass
class Place:
    """This process among the others."""

    rank: int
    ranks: int
    device: torch.device
    waiting: Any
    """A group whose barrier keeps no GPU busy."""

    def say(self, **facts: Any) -> None:
        """A line of JSON from the first process."""
        if self.rank == 0:
            print(json.dumps(facts), flush=True)


@dataclasses.dataclass
class Found:
    """What one training measured; the same on every rank that took part."""

    losses: list[float]
    tokens_per_second: float
    peak_gib: list[float]
    """Of each rank."""


def main() -> None:
    options = parse()
    gpu = torch.cuda.is_available() and not options.cpu
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    # A device's own library for gradients, and a group on the host for waiting.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(minutes=10))
    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))
    place = Place(dist.get_rank(), dist.get_world_size(), device, waiting)
    if options.batch % place.ranks:
        raise SystemExit(f"--batch {options.batch} cannot be divided between {place.ranks} processes")
    place.say(
        model=options.model,
        device=torch.cuda.get_device_name(device) if gpu else "cpu",
        torch=torch.__version__,
        processes=place.ranks,
        length=options.length,
        samples_a_step=options.batch,
    )
    (measure_sharded if options.sharded else measure_replicas)(options, place)
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-3b", help=f"a config.json, or one of {', '.join(SHAPES)}")
    parser.add_argument("--memory", default="gated_deltanet")
    parser.add_argument("--length", type=int, default=24576, help="tokens of a sample")
    parser.add_argument("--window", type=int, default=8064)
    parser.add_argument("--sinks", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="samples a step, over all GPUs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sharded", action="store_true", help="FSDP2 on all GPUs instead")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def measure_replicas(options: argparse.Namespace, place: Place) -> None:
    """One GPU, then all with DDP."""
    alone = None
    if place.rank == 0:
        student = replica(options, place.device)
        alone = train(student, student, options, Place(0, 1, place.device, None), contextlib.nullcontext)
        place.say(run="1 GPU", **dataclasses.asdict(alone))
        del student
        release(place.device)
    dist.barrier(place.waiting)
    student = replica(options, place.device)
    devices = [place.device] if place.device.type == "cuda" else None
    wrapped = DistributedDataParallel(student, device_ids=devices)
    together = train(wrapped, student, options, place, wrapped.no_sync)
    place.say(run=f"{place.ranks} GPUs, DDP", **dataclasses.asdict(together))
    if alone is not None:
        apart = max(abs(a - b) for a, b in zip(alone.losses, together.losses, strict=True))
        place.say(
            ratio=together.tokens_per_second / alone.tokens_per_second,
            largest_difference_of_losses=apart,
            relative=apart / min(alone.losses),
            fell_by=1 - alone.losses[-1] / alone.losses[0],
        )


def measure_sharded(options: argparse.Namespace, place: Place) -> None:
    """All GPUs with FSDP2."""
    start = time.perf_counter()
    student = sharded(options, place)
    place.say(made_in_s=time.perf_counter() - start, rank_0_gib=so_far() / 2**30)
    found = train(student, student, options, place, contextlib.nullcontext)
    place.say(
        run=f"{place.ranks} GPUs, FSDP2", fell_by=1 - found.losses[-1] / found.losses[0], **dataclasses.asdict(found)
    )


def replica(options: argparse.Namespace, device: torch.device) -> Student:
    """The whole model on this device, the same in every process."""
    torch.manual_seed(0)
    model = base(options, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.mul_(SHARP)
    return ready(model, options)


def sharded(options: argparse.Namespace, place: Place) -> Student:
    """A model of which this process never holds more than its share of the weights and one layer."""
    student = ready(base(options, torch.device("meta")), options)
    mesh = init_device_mesh(place.device.type, (place.ranks,))
    for layer in student.layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
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
            fn = layer.ahn.fn
            with place.device:
                fresh = dict(type(fn)(fn.hidden_size, fn.heads, fn.head_dim, fn.kv_heads).named_parameters())
            for name, parameter in fn.named_parameters():
                whole = distribute_tensor(fresh[name].float(), parameter.device_mesh, parameter.placements)
                parameter.to_local().copy_(whole.to_local())
    return student


def _initialise(name: str, share: Tensor) -> None:
    if name.endswith("bias"):
        share.zero_()
    elif "norm" in name:
        share.fill_(1)
    else:
        share.normal_(std=SHARP * INIT_STD if "q_proj" in name else INIT_STD)


def base(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A causal language model with random weights, or on "meta" with none."""
    config = configuration(options.model) if options.model in SHAPES else AutoConfig.from_pretrained(options.model)
    with device:
        dtype = torch.float32 if options.cpu else torch.bfloat16
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def ready(model: PreTrainedModel, options: argparse.Namespace) -> Student:
    """Teacher and student, whose layers keep nothing."""
    student = Student(ahn.attach(model, ahn.AHNConfig(options.memory, window=options.window, sinks=options.sinks)))
    with warnings.catch_warnings():  # a newer name exists, which older versions of transformers lack
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return student.train()


def train(
    module: nn.Module,
    student: Student,
    options: argparse.Namespace,
    place: Place,
    unsynchronised: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Found:
    """Optimiser steps on one batch.

    Args:
        module: the student as it is called.
        unsynchronised: inside this block a backward pass keeps its gradients to itself.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = student.model.config.vocab_size
    batch = torch.randint(vocabulary, (options.batch, 1, options.length), generator=generator)
    own = batch[place.rank :: place.ranks]
    count = options.batch * (options.length - options.window - options.sinks - 1)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.1, fused=True)
    losses, times = [], []
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    divided = any(isinstance(p, DTensor) for p in parameters)
    with contextlib.nullcontext() if divided else leaves_fused(student.model):
        for step in range(options.steps):
            synchronize(place.device)
            start = time.perf_counter()
            loss = torch.zeros((), device=place.device)
            for number, ids in enumerate(own):
                with unsynchronised() if number < len(own) - 1 else contextlib.nullcontext():
                    found = module(MicroBatch({"input_ids": ids}, options.window, options.sinks, count))
                    (found.loss * place.ranks).backward()  # gradients are averaged over ranks
                loss += found.loss.detach()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if place.ranks > 1:
                dist.all_reduce(loss)
            losses.append(loss.item())
            times.append(time.perf_counter() - start)
            place.say(step=step, loss=losses[-1], seconds=times[-1])
    peaks: list[Any] = [so_far() / 2**30]
    if place.ranks > 1:
        peaks = [None] * place.ranks
        dist.all_gather_object(peaks, so_far() / 2**30, group=place.waiting)
    seconds = statistics.median(times[options.warmup :])
    return Found(losses, options.batch * options.length / seconds, peaks)


if __name__ == "__main__":
    main()

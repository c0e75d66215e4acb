"""Prefill and decode of one model on one GPU, over all of them by layers (`device_map`), and by heads (`tp_plan`).

Weights are random, the same in every process and way, and so is the memory, which each way loads from one adapter.
All ways read the same prompt and then the tokens that the first one chose, so that what differs is rounding.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import dispatch_model
from place import Place
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import private
from ahn.measure.clock import release, seconds

WARM_STEPS, STEPS = 8, 48
READ_STD = 0.02
"""Of the projection of a memory's read, which is zero in a new one."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and a prompt of `length` tokens."""

    base: Callable[[torch.device], PreTrainedModel]
    config: ahn.AHNConfig
    length: int


@dataclasses.dataclass
class Heard:
    """What a model said: logits (V,) after the prompt, and the most probable token of each step, on the CPU."""

    logits: Tensor
    tokens: Tensor


def one_gpu(work: Work, place: Place, first: Heard | None) -> tuple[dict[str, Any], Heard | None]:
    """The first process alone: captured steps, and ordinary ones, which also show what rounding does."""
    if place.rank:
        return {}, None
    model = loaded(work, place, lambda model: model)
    captured, heard = read(model, work, place, None, captured=True)
    ordinary, _ = read(model, work, place, heard, captured=False)
    return {"captured": captured, "ordinary": ordinary}, heard


def over_layers(work: Work, place: Place, first: Heard | None) -> tuple[dict[str, Any], Heard | None]:
    """The first process alone, with as many layers on each GPU."""
    if place.rank:
        return {}, None
    model = loaded(work, place, lambda model: spread(model, place))
    ordinary, heard = read(model, work, place, first, captured=False)
    return {"ordinary": ordinary}, heard


def over_heads(work: Work, place: Place, first: Heard | None) -> tuple[dict[str, Any], Heard | None]:
    """All processes together, each with its heads."""
    box: list[Any] = [first]
    dist.broadcast_object_list(box, group=place.waiting)
    model = loaded(work, place, divided)
    ordinary, heard = read(model, work, place, box[0], captured=False)
    place.say(part="heads", **ordinary)  # a graph with sums over processes in it may fail in ways that no one catches
    captured, _ = read(model, work, place, box[0] or heard, captured=True)
    found = {"ordinary": ordinary, "captured": captured}
    if place.device.type == "cuda":  # each process knows of its own
        for facts in found.values():
            facts["peak_gib"] = place.of_all(facts["peak_gib"][place.rank])
    return found, heard


def spread(model: PreTrainedModel, place: Place) -> PreTrainedModel:
    """Equal numbers of layers on each GPU, what comes after them on the last."""
    count = model.config.num_hidden_layers
    gpus: list[Any] = list(range(place.ranks)) if place.device.type == "cuda" else ["cpu"]
    devices = {f"model.layers.{i}": gpus[i * len(gpus) // count] for i in range(count)}
    devices |= {"model.embed_tokens": gpus[0], "model.rotary_emb": gpus[0], "model.norm": gpus[-1]}
    devices["lm_head"] = gpus[-1]
    return dispatch_model(model, devices, skip_keys=private.CACHE)


def divided(model: PreTrainedModel) -> PreTrainedModel:
    """The model by transformers' own plan: what it does with a checkpoint, with weights that are there."""
    weights, config = model.state_dict(), model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a newer name exists, which older versions lack
        parts: PreTrainedModel = type(model).from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype, tp_plan="auto"
        )
    return parts.eval().requires_grad_(False)


def loaded(work: Work, place: Place, way: Callable[[PreTrainedModel], PreTrainedModel]) -> PreTrainedModel:
    """A model brought to its GPUs in one way, with the memory from an adapter's file."""
    model = work.base(place.device)
    torch.manual_seed(0)
    ahn.attach(model, work.config)
    parameters = ahn.adapter_parameters(model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name, x in parameters.items():
            if ".o_proj." in name:
                x.normal_(std=READ_STD)
        if parameters:
            ahn.save_adapter(model, folder)
        ahn.detach(model)
        placed = way(model)
        if parameters:
            ahn.load_adapter(placed, folder, work.config.window, work.config.sinks)
        else:
            ahn.attach(placed, work.config)
    del model
    release(place.device)
    return placed


@torch.no_grad()
def read(
    model: PreTrainedModel, work: Work, place: Place, first: Heard | None, captured: bool
) -> tuple[dict[str, Any], Heard]:
    """A prompt twice, of which the second time counts, and steps after it.

    Args:
        first: whose tokens are read; None reads the own ones.
        captured: let steps be captured; one that a loss is wanted of is not.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, work.length), generator=generator).to(place.device)
    devices = range(torch.cuda.device_count() if place.device.type == "cuda" else 0)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    found: dict[str, Any] = {}

    def prompt() -> None:
        cache = ahn.AHNCache.for_model(model)
        found["logits"] = model(ids, logits_to_keep=1, **{private.CACHE: cache}).logits[0, -1].float()
        found["cache"] = cache

    began = time.perf_counter()
    prompt()
    warm = time.perf_counter() - began
    prefill = seconds(place.device, prompt)
    token, chosen = found["logits"].argmax(), []
    given = None if first is None else first.tokens.to(place.device)

    def steps(count: int) -> None:
        nonlocal token
        for _ in range(count):
            chosen.append(token)
            token = token if given is None else given[len(chosen) - 1]
            new = token.view(1, 1)
            output = model(new, labels=None if captured else new, **{private.CACHE: found["cache"]})
            token = output.logits[0, -1].argmax()

    warm_steps = seconds(place.device, lambda: steps(WARM_STEPS))
    per_token = seconds(place.device, lambda: steps(STEPS)) / STEPS
    heard = Heard(found["logits"].cpu(), torch.stack(chosen).cpu())
    facts = {
        "prefill_s": prefill,
        "ms_per_token": 1e3 * per_token,
        "first_prefill_s": warm,
        "first_steps_s": warm_steps,
        "heads": model.get_decoder().layers[0].ahn.fn.heads,
        "peak_gib": [torch.cuda.max_memory_allocated(device) / 2**30 for device in devices],
    }
    return facts | ({} if first is None else agreement(heard, first)), heard


def agreement(heard: Heard, first: Heard) -> dict[str, float]:
    """How near two ways are: of the logits after the prompt, and in which share of steps the same token is first."""
    away = (heard.logits - first.logits).norm() / first.logits.norm()
    return {"logits_apart": float(away), "same_tokens": float((heard.tokens == first.tokens).float().mean())}

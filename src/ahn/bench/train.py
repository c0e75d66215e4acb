"""Time and peak memory of one step of self-distillation."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from ahn.bench import roofline
from ahn.bench.fill import random_tokens
from ahn.bench.profile import kernels
from ahn.bench.stand import Stand, timed
from ahn.decode.compiled import leaves_fused
from ahn.errors import AHNError
from ahn.measure import peak
from ahn.measure.clock import release, repeated, seconds
from ahn.measure.method import Method
from ahn.memory import recurrent
from ahn.model.adapter import adapter_parameters
from ahn.training import distillation_loss


def measure(stand: Stand, method: Method, context: int, batch: int) -> dict[str, Any]:
    """Forward passes of teacher and student and the backward pass, for B sequences of `context` tokens.

    Gradient checkpointing is on, the base has the model's dtype and the memory float32.
    """
    if not method.trainable or method.config is None:
        raise AHNError(f"{method.name} has no parameters to train.")
    if method.config.memory not in recurrent():
        raise AHNError(f"bench train measures distillation, and {method.name} learns in another way: choose others.")
    model, device, config = stand.model, stand.device, method.config
    ids = random_tokens(model, batch, context).cpu()  # as batches come
    parameters = list(adapter_parameters(model).values())
    valid: list[int] = []

    def step() -> None:
        found = distillation_loss(model, ids, config.window, config.sinks)
        found.loss.backward()
        valid.append(found.valid)
        for parameter in parameters:
            parameter.grad = None

    profiled: dict[str, Any] = {}
    with _training(model, parameters):
        warmup = seconds(device, step)
        release(device)
        with peak.measure(device, stand.held()) as memory:
            times = repeated(device, step, stand.settings.repeats, stand.settings.budget)
        if stand.settings.profile:
            profiled["kernels"] = kernels(device, step)
    work = roofline.distillation(model, config, context, batch, valid[-1], recomputed=True)
    trained = {"loss_positions": valid[-1], "trained_parameters": sum(p.numel() for p in parameters)}
    return timed(stand, times, batch * context, memory, work) | trained | {"warmup_s": warmup} | profiled


@contextlib.contextmanager
def _training(model: PreTrainedModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """As `ahn train` sets a model up: gradient checkpointing, gradients for these parameters; as before afterwards."""
    _checkpoint(model, True)
    model.train()
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with leaves_fused(model):
            yield
    finally:
        _checkpoint(model, False)
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _checkpoint(model: PreTrainedModel, wanted: bool) -> None:
    with warnings.catch_warnings():  # new names, which older versions that we support do not know
        warnings.simplefilter("ignore", FutureWarning)
        if wanted:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()

"""Time and peak memory of one step of self-distillation."""

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
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
from ahn.measure.clock import release, repeated, seconds, synchronize
from ahn.measure.method import Method
from ahn.memory import recurrent
from ahn.model.adapter import adapter_parameters
from ahn.training import distillation_loss
from ahn.wrappers import decoder_of

PHASES = ("teacher", "student", "losses", "backward")
SHORT, SHORT_SINKS = 128, 2
"""Tokens of a step that keeps a GPU waiting for the host all the time, half of them exact, and of its sinks."""


def measure(stand: Stand, method: Method, context: int, batch: int) -> dict[str, Any]:
    """Forward passes of teacher and student and the backward pass, for B sequences of `context` tokens.

    The base has the model's dtype and the memory float32. `phases_s` says when the device was done with each phase of
    one more step, `host_phases_s` the same of a step so short that the host is what takes time.
    """
    if not method.trainable or method.config is None:
        raise AHNError(f"{method.name} has no parameters to train.")
    if method.config.memory not in recurrent():
        raise AHNError(f"bench train measures distillation, and {method.name} learns in another way: choose others.")
    model, device, config = stand.model, stand.device, method.config
    checkpointing = stand.settings.activation_checkpointing
    ids = random_tokens(model, batch, context).cpu()  # as batches come
    parameters = list(adapter_parameters(model).values())
    valid: list[int] = []

    def step(short: bool = False, mark: Callable[[], Any] = lambda: None) -> None:
        some, window, sinks = ids, config.window, config.sinks
        if short:
            some, sinks = ids[:1, :SHORT], SHORT_SINKS
            window = some.shape[1] // 2 - sinks
        found = distillation_loss(model, some, window, sinks)
        mark()
        found.loss.backward()
        mark()
        valid.append(found.valid)
        for parameter in parameters:
            parameter.grad = None

    found: dict[str, Any] = {"activation_checkpointing": checkpointing}
    with _training(model, parameters, checkpointing):
        found["warmup_s"] = seconds(device, step)
        release(device)
        with peak.measure(device, stand.held()) as memory:
            times = repeated(device, step, stand.settings.repeats, stand.settings.budget)
        found["loss_positions"] = valid[-1]
        found["phases_s"] = _phases(model, device, step)
        if stand.settings.profile:
            found["kernels"] = kernels(device, step)
        for _ in range(2):  # the first compiles for other sizes
            found["host_phases_s"] = _phases(model, device, lambda mark: step(True, mark))
    work = roofline.distillation(model, config, context, batch, found["loss_positions"], checkpointing)
    found["trained_parameters"] = sum(p.numel() for p in parameters)
    return timed(stand, times, batch * context, memory, work) | found


def _phases(model: PreTrainedModel, device: torch.device, step: Callable[..., None]) -> dict[str, float]:
    """Seconds on the device (on a CPU, of the host) that each of `PHASES` of one step takes."""
    gpu = device.type == "cuda"
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if gpu else time.perf_counter())
        if gpu:
            marks[-1].record()

    synchronize(device)
    handle = decoder_of(model).register_forward_hook(mark)
    mark()
    try:
        step(mark=mark)
    finally:
        handle.remove()
    synchronize(device)
    times = [a.elapsed_time(b) / 1e3 if gpu else b - a for a, b in itertools.pairwise(marks)]
    return dict(zip(PHASES, times, strict=True))


@contextlib.contextmanager
def _training(model: PreTrainedModel, parameters: list[torch.nn.Parameter], checkpointing: bool) -> Iterator[None]:
    """As `ahn train` sets a model up: checkpointing or not, gradients for these parameters; as before afterwards."""
    _checkpoint(model, checkpointing)
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

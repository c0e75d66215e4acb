"""A compact training loop on one device, for many small memories; `ahn train` has a trainer of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ahn.decode.compiled import leaves_fused
from ahn.errors import AHNError
from ahn.model.adapter import adapter_parameters, set_window
from ahn.training.distillation import Batch, check_head, distillation_loss
from ahn.training.losses import parse_loss
from ahn.training.schedule import WindowDraw, WindowSchedule


@dataclasses.dataclass(frozen=True)
class StepLog:
    """What one step did. Losses in nats, as in `Distillation`; the gradient's norm is that before clipping."""

    step: int
    loss: float
    kl: float
    ce: float
    teacher_ce: float
    gradient_norm: float
    window: int
    sinks: int
    lr: float
    valid: int

    @property
    def gap(self) -> float:
        """What the student loses against full attention, nats a token."""
        return self.ce - self.teacher_ce


def distill(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    steps: int,
    schedule: WindowSchedule,
    loss: str = "kl",
    lr: float = 1e-4,
    weight_decay: float = 0.1,
    warmup: float = 0.1,
    max_gradient_norm: float = 1.0,
    use_normalized_l2: bool = False,
    bf16: bool = False,
    log_every: int = 1,
    on_step: Callable[[StepLog], None] | None = None,
) -> list[StepLog]:
    """Train a model's memory to give what full attention gives: AdamW on the adapter's parameters alone.

    The loop does not wait for the device between logs if batches come on the CPU (transformers asks it once a forward
    whether samples are packed). Afterwards the model has its own window and `requires_grad` flags again. Train or eval
    mode is the caller's: gradient checkpointing needs train mode.

    Args:
        model: with an AHN attached; its adapter in float32 (as `attach` makes it), the base in any precision.
        batches: one a step, see `distillation_loss`.
        steps: optimiser steps.
        schedule: draws window and sinks of each step; it holds the seed.
        loss: "kl", "ce", "distill" or a sum.
        lr: peak learning rate; linear warm-up over the first `warmup` of the steps, then a cosine to zero.
        weight_decay: of matrices; vectors (norms, biases, decay rates) have none.
        max_gradient_norm: longer gradients are scaled down to this.
        use_normalized_l2: see `distillation_loss`.
        bf16: run both passes under bfloat16 autocast, for a float32 base.
        log_every: steps between reads of the losses from the device.
        on_step: called for every step in order, in bursts of `log_every`.

    Returns:
        The log of every step.

    Raises:
        AHNError: too few batches; an adapter without parameters or not float32; or a loss or gradient that is not
            finite, in which case the adapter is left as it was before that step.
    """
    parse_loss(loss)
    if steps < 1 or log_every < 1:
        raise AHNError(f"steps and log_every must be at least 1, got {steps} and {log_every}.")
    parameters = list(adapter_parameters(model).values())
    if not parameters:
        raise AHNError(f"The memory {model.ahn_config.memory!r} has no parameters; there is nothing to train.")
    check_head(model)
    optimizer = _Optimizer(parameters, weight_decay, max_gradient_norm)
    device = parameters[0].device.type
    logs: list[StepLog] = []
    pending: list[tuple[StepLog, Tensor]] = []
    with _only_trainable(model, parameters), _window_kept(model), leaves_fused(model):
        source = iter(batches)
        for step in range(steps):
            batch = next(source, None)
            if batch is None:
                raise AHNError(f"The batches ended after {step} of {steps} steps; give more, or ask for fewer steps.")
            draw = schedule.draw(step, _length(batch))
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                found = distillation_loss(
                    model, batch, draw.window, draw.sinks, loss, use_normalized_l2, start=draw.start
                )
            found.loss.backward()
            rate = lr * learning_rate_factor(step, steps, warmup)
            norm = optimizer.step(found.loss, rate)
            numbers = torch.stack([found.loss.detach(), found.kl, found.ce, found.teacher_ce, norm])
            pending.append((_blank_log(step, draw, rate, found.valid), numbers))
            if len(pending) == log_every or step == steps - 1:
                logs += _read(pending, on_step)
                pending = []
    return logs


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: up in a line over `warmup · steps`, down in a cosine to nearly 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


class _Optimizer:
    """AdamW with clipping that stops for good at the first number that is not finite, without asking the device."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float, max_norm: float) -> None:
        if any(p.dtype != torch.float32 for p in parameters):
            raise AHNError("The adapter must be float32 to be trained (the base need not be): convert its parameters.")
        self.parameters, self.max_norm = parameters, max_norm
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, fused=True)
        # The fused kernel does nothing where `found_inf` is 1: how GradScaler skips a step. Ours is never reset, so the
        # parameters stay as they were until the host reads the losses and raises.
        vars(self.adamw).update(grad_scale=None, found_inf=torch.zeros((), device=parameters[0].device))

    def step(self, loss: Tensor, lr: float) -> Tensor:
        """Update from the gradients and clear them; returns their norm before clipping, on the device."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss.detach()))
        vars(self.adamw)["found_inf"] = torch.maximum(vars(self.adamw)["found_inf"], bad.float())
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        return norm


def _blank_log(step: int, draw: WindowDraw, lr: float, valid: int) -> StepLog:
    """A log whose losses are still on the device."""
    unread = math.nan
    return StepLog(step, unread, unread, unread, unread, unread, draw.window, draw.sinks, lr, valid)


def _read(pending: list[tuple[StepLog, Tensor]], on_step: Callable[[StepLog], None] | None) -> list[StepLog]:
    """Fetch the numbers of some steps in one transfer."""
    logs = []
    for (blank, _), row in zip(pending, torch.stack([numbers for _, numbers in pending]).tolist(), strict=True):
        names = ("loss", "kl", "ce", "teacher_ce", "gradient_norm")
        log = dataclasses.replace(blank, **dict(zip(names, row, strict=True)))
        if not (math.isfinite(log.loss) and math.isfinite(log.gradient_norm)):
            raise AHNError(
                f"Step {log.step}: loss {log.loss}, gradient norm {log.gradient_norm}. The adapter is left as it was "
                "before this step; lower the learning rate, or look at this step's batch."
            )
        if on_step is not None:
            on_step(log)
        logs.append(log)
    return logs


def _length(batch: Batch) -> int:
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    return ids.shape[-1]


@contextlib.contextmanager
def _only_trainable(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; the flags are as before afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextlib.contextmanager
def _window_kept(model: PreTrainedModel) -> Iterator[None]:
    """The model's window and sinks are as before afterwards."""
    config = model.ahn_config
    try:
        yield
    finally:
        set_window(model, config.window, config.sinks)

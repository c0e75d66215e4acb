"""One step of self-distillation: the teacher is the model with full attention, the student the same with its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.errors import AHNError
from ahn.model.adapter import set_window
from ahn.model.attached import disabled
from ahn.training.losses import (
    CHUNK,
    IGNORED,
    Head,
    attention_loss,
    hidden_losses,
    next_tokens,
    nothing_counts,
    parse_loss,
    to_device,
    valid_positions,
)
from ahn.wrappers import attached, attention_of, decoder_of

Batch: TypeAlias = Tensor | Mapping[str, Tensor]


class Distillation(NamedTuple):
    """Losses of one batch, float32 scalars on the model's device; only `loss` carries a gradient.

    With a `count` given to `distillation_loss` they are this batch's share of the losses of a larger one.
    """

    loss: Tensor
    """What is minimised."""
    kl: Tensor
    """KL(teacher ‖ student), nats per position."""
    ce: Tensor
    """Next-token cross entropy of the student, nats per token."""
    teacher_ce: Tensor
    """The same of the teacher; `ce - teacher_ce` is the gap that the memory shall close."""
    valid: int
    """Number of positions of this batch that count."""


def distillation_loss(
    model: PreTrainedModel,
    batch: Batch,
    window: int,
    sinks: int,
    loss: str = "kl",
    use_normalized_l2: bool = False,
    chunk: int = CHUNK,
    count: int | None = None,
    start: int = 0,
) -> Distillation:
    """Losses of a student with this window against its own full attention (docs/spec.md, section 6).

    The model keeps the given window afterwards: with gradient checkpointing the backward pass runs the student again.

    Args:
        model: with an AHN attached.
        batch: token ids (B, L), or a mapping with `input_ids` and, each (B, L) and optional, `attention_mask`
            (0 is padding) and `labels` (-100 is not to be learned; all tokens if absent). Best left on the CPU: which
            positions count is then known without waiting for the model's device.
        window: of the student, in tokens.
        sinks: likewise.
        loss: "kl", "ce", "distill" or a sum of them.
        use_normalized_l2: for "distill", compare directions of attention outputs rather than the outputs.
        chunk: positions whose logits exist at once.
        count: positions that count in all parts of a larger batch of which this is one; losses and gradients of the
            parts then add up to the whole's. This part may have none.
        start: position of each row's first token, for teacher and student.

    Raises:
        AHNError: an unknown loss, a malformed batch, or no position that counts.
    """
    terms = parse_loss(loss)
    ids, mask, labels = unpack(batch)
    targets = next_tokens(labels)
    positions = valid_positions(targets, window + sinks, mask)
    valid = int(positions.sum())
    if not (count or valid):
        raise nothing_counts(window + sinks, ids.shape[1])
    inputs = model_inputs(model, ids, mask, start)
    set_window(model, window, sinks)
    compare = "distill" in terms
    with disabled(model), torch.no_grad(), _attention_outputs(model, compare) as teacher_outputs:
        teacher = _hidden(model, inputs)
    with _attention_outputs(model, compare) as student_outputs:
        student = _hidden(model, inputs)
    weights = {term: float(term in terms) for term in ("kl", "ce")}
    losses = hidden_losses(student, teacher, targets, positions, Head.of(model), **weights, chunk=chunk, count=count)
    total = losses.loss
    if compare:
        total = total + attention_loss(student_outputs, teacher_outputs, positions, use_normalized_l2, count)
    return Distillation(total, losses.kl, losses.ce, losses.teacher_ce, valid)


def check_head(model: PreTrainedModel) -> None:
    """Make sure that the losses see the model's own logits: some architectures scale them in ways of their own.

    Raises:
        AHNError: `Head` gives other logits than the model.
    """
    attached(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with disabled(model), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        found = Head.of(model).logits(_hidden(model, {"input_ids": ids})[0])
    # bfloat16 logits are rounded by 2^-9 of their size; a scale or a cap changes them by far more than 1 %.
    if (found - expected).abs().max() > 0.01 * expected.abs().max():
        raise AHNError(
            f"{type(model).__name__} changes its logits in a way that the losses do not know; distillation supports a "
            "linear head, with a bias and final_logit_softcapping where the model has them."
        )


def _hidden(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states (B, L, D), normalised as the head takes them."""
    return decoder_of(model)(**inputs, use_cache=False).last_hidden_state


def model_inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, start: int) -> dict[str, Tensor]:
    """What `unpack` gave as a model takes it, on its device, with the first token of each row at position `start`."""
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": to_device(ids, device)}
    if mask is not None:
        inputs["attention_mask"] = to_device(mask, device)
    if start:
        inputs["position_ids"] = torch.arange(start, start + ids.shape[1], device=device)[None]
    return inputs


def unpack(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Token ids, the attention mask unless nothing is padded, and labels in which padding is masked; each (B, L)."""
    fields = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    used = {name: fields[name] for name in ("input_ids", "attention_mask", "labels") if fields.get(name) is not None}
    shapes = {name: tuple(x.shape) for name, x in used.items()}
    if len(shapes.get("input_ids", ())) != 2 or len(set(shapes.values())) != 1:
        raise AHNError(
            f"A batch needs input_ids, and attention_mask and labels of the same shape (B, L); got {shapes}."
        )
    ids, mask = used["input_ids"], used.get("attention_mask")
    labels = used.get("labels", ids)
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORED)
        mask = None if mask.all() else mask
    return ids, mask, labels


@contextlib.contextmanager
def _attention_outputs(model: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects the attention outputs (B, L, D) of the layers with a memory in the order of the layers."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: tuple[Tensor, ...]) -> None:
        outputs.append(output[0])

    layers = [layer for layer in decoder_of(model).layers if wanted and hasattr(layer, "ahn")]
    attentions = [attention_of(model, layer.ahn.index) for layer in layers]
    handles = [attention.register_forward_hook(keep) for attention in attentions]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()

"""Distillation losses from hidden states, in chunks: the logits of a whole sequence never exist.

Shapes: B batch, L tokens, D hidden size, V vocabulary, N positions that count. The language-model head is frozen, so a
loss is a function of the student's hidden states alone, and its gradient (N, D) is worked out together with its value,
chunk by chunk, in the forward pass (the idea of Liger's fused losses, arXiv 2410.10989). Nothing of size N × V is kept.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ahn.decode.compiled import compiled
from ahn.errors import AHNError
from ahn.ops import has_triton

LOSSES = ("kl", "ce", "distill")
ATTENTION = "attention"
"""What a memory of tokens learns from; see `ahn.training.looks`."""
IGNORED = -100
CHUNK = 1024


def parse_loss(loss: str) -> tuple[str, ...]:
    """The terms of a sum such as "kl+ce"."""
    terms = tuple(term.strip() for term in loss.split("+"))
    if any(term not in LOSSES for term in terms) or len(set(terms)) < len(terms):
        raise AHNError(
            f"Unknown loss {loss!r}; choose from {', '.join(LOSSES)}, or a sum of different ones like 'kl+ce'."
        )
    return terms


def next_tokens(labels: Tensor) -> Tensor:
    """The token each position predicts: labels (B, L) moved one to the left, -100 (none) at the last position."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def valid_positions(targets: Tensor, lossless: int, attention_mask: Tensor | None = None) -> Tensor:
    """Positions that count in the loss: at least the lossless total, and predicting a token that is not masked.

    Args:
        targets: (B, L) from `next_tokens`; -100 is masked.
        lossless: sinks + window of the student; before it student and teacher see the same.
        attention_mask: (B, L), 0 is padding, which is not counted in a token's position.
    """
    B, L = targets.shape
    if attention_mask is None:
        position = torch.arange(L, device=targets.device).expand(B, L)
    else:
        position = attention_mask.cumsum(1) - 1
    valid = (targets != IGNORED) & (position >= lossless)
    if attention_mask is not None:
        valid &= attention_mask != 0
    return valid


def nothing_counts(lossless: int, length: int) -> AHNError:
    """The error for a step in which no position counts, on sequences of up to `length` tokens."""
    return AHNError(
        f"No position counts in the loss: with a lossless total of T = {lossless} in sequences of L = {length} tokens, "
        "no unmasked token is predicted from position T or later; use longer sequences or a smaller window."
    )


@dataclasses.dataclass(frozen=True)
class Head:
    """The frozen map from hidden states to logits: weight (V, D), bias (V) or None, soft cap of the logits or None."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The head of a transformers causal language model."""
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise AHNError(f"{type(model).__name__} has no linear language-model head; distillation needs one.")
        softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(linear.weight.detach(), bias, softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) to float32 (n, V)."""
        logits = _matmul(hidden, self.weight.t())
        if self.bias is not None:
            logits += self.bias
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient (n, D) of the hidden states from that of their `logits` (n, V), which it overwrites. Float32."""
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        return _matmul(grad, self.weight)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32; on CUDA from factors in the precision of b (or of autocast).

    A bfloat16 result would round logits of 20 to steps of 1/8, which is noise as large as a good student's loss.
    """
    device = a.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else b.dtype
    with torch.autocast(device, enabled=False):
        if a.is_cuda and dtype != torch.float32:
            return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
        return a.float() @ b.float()


class Losses(NamedTuple):
    """Sums over the positions divided by their count, float32 scalars. Only `loss` carries a gradient."""

    loss: Tensor
    kl: Tensor
    ce: Tensor
    teacher_ce: Tensor


def hidden_losses(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    positions: Tensor,
    head: Head,
    kl: float = 1.0,
    ce: float = 0.0,
    chunk: int = CHUNK,
    count: int | None = None,
) -> Losses:
    """KL(teacher ‖ student) over the vocabulary and the cross entropies, averaged over the given positions.

    Args:
        student, teacher: last hidden states (B, L, D); no gradient reaches the teacher or the head.
        targets: (B, L), the token each position predicts. Must be a token wherever `positions` is true.
        positions: (B, L) boolean, on the device of `targets`. On the CPU they cost no wait for the model's device.
        kl, ce: weights of the two terms in `loss`.
        chunk: positions whose logits exist at once, about 20 · chunk · V bytes (14 on a GPU).
        count: what the sums are divided by, if not the number of these positions. A batch in several parts, each with
            the count of all, gives losses and gradients that add up to those of the whole; a part may have none.
    """
    index = positions.flatten().nonzero().squeeze(1)
    labels = to_device(targets.flatten().index_select(0, index), student.device)
    index = to_device(index, student.device)
    rows = [x.flatten(0, 1).index_select(0, index) for x in (student, teacher.detach())]
    return Losses(*_HiddenLosses.apply(*rows, labels, head, kl, ce, chunk, count or rows[0].shape[0]))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; from the CPU through pinned memory, which does not wait for the device's queue."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


class _HiddenLosses(torch.autograd.Function):
    """`hidden_losses` on the rows (n, D) that count, as a share of N."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, head: Head, kl: float, ce: float, chunk: int, N: int
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[0] and bool(kl or ce)
        grad = torch.zeros_like(student) if wanted else None
        sums = torch.zeros(3, device=student.device)
        for start in range(0, student.shape[0], chunk):
            part = slice(start, start + chunk)
            found, gradient = _chunk_losses(student[part], teacher[part], labels[part], head, kl, ce, wanted)
            sums += found
            if grad is not None:
                grad[part] = gradient.div_(N)
        means = sums / N
        ctx.save_for_backward(grad)
        outputs = (kl * means[0] + ce * means[1], *means.unbind())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (None if grad is None else grad * grads[0].to(grad.dtype), *[None] * 7)


def _chunk_losses(
    student: Tensor, teacher: Tensor, labels: Tensor, head: Head, kl: float, ce: float, wanted: bool
) -> tuple[Tensor, Any]:
    """Sums of KL and both cross entropies over n rows (3,), and the gradient (n, D) of `kl·KL + ce·CE` if wanted.

    A function of its own, so that one chunk's logits are gone before the next one's are made.
    """
    logits = head.logits(student)
    compare = compiled(_compare) if logits.is_cuda and has_triton() else _compare
    # On a GPU the gradient is a factor in the head's precision next; a soft cap has to be worked in before.
    dtype = head.weight.dtype if logits.is_cuda and head.softcap is None else torch.float32
    sums, grad = compare(logits, head.logits(teacher), labels, kl, ce, dtype if wanted else None)
    return sums, None if grad is None else head.backward(grad, logits)


def _compare(
    logits: Tensor, teacher: Tensor, labels: Tensor, kl: float, ce: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """`_chunk_losses` from the logits of both (n, V); the gradient (n, V) of the student's if a dtype is given for it.

    Written for few passes over memory as it stands, and compiled, where it is two or three, on a GPU.
    """
    log_s, log_t = logits.log_softmax(-1), teacher.log_softmax(-1)
    target = labels.unsqueeze(1)
    p_t = log_t.exp()
    ce_s, ce_t = -log_s.gather(1, target).sum(), -log_t.gather(1, target).sum()
    sums = torch.stack([log_t.sub_(log_s).mul_(p_t).sum(), ce_s, ce_t])
    if dtype is None:
        return sums, None
    # d/dlogits of kl·KL + ce·CE, for probabilities s and t: (kl + ce)·s - kl·t - ce·onehot
    g = log_s.exp_().mul_(kl + ce).sub_(p_t.mul_(kl))
    if ce:
        g.scatter_add_(1, target, torch.full_like(target, -ce, dtype=g.dtype))
    return sums, g.to(dtype)


def attention_loss(
    student: list[Tensor], teacher: list[Tensor], positions: Tensor, use_normalized_l2: bool, count: int | None = None
) -> Tensor:
    """Mean squared error between the layers' attention outputs, averaged over positions, features and layers.

    Args:
        student, teacher: one attention output (B, L, D) per layer.
        use_normalized_l2: scale each output to unit L2 norm over its features first.
        count: positions to average over, if not the number of these; see `hidden_losses`.
    """
    index = positions.flatten().nonzero().squeeze(1)
    N = count or index.shape[0]
    index = to_device(index, student[0].device)
    # Checkpointed: the float32 copies of every layer together would outweigh the model's own activations.
    errors = [
        checkpoint(_attention_error, s, t.detach(), index, use_normalized_l2, use_reentrant=False)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean() / (N * student[0].shape[-1])


def _attention_error(student: Tensor, teacher: Tensor, index: Tensor, use_normalized_l2: bool) -> Tensor:
    ours, theirs = (x.flatten(0, 1).index_select(0, index).float() for x in (student, teacher))
    if use_normalized_l2:
        ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
    return F.mse_loss(ours, theirs, reduction="sum")

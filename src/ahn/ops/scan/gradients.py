"""`ahn.ops.scan.kernel`'s scan with gradients, kernels with fixed settings both ways.

Of a layer the backward keeps its inputs and, per state and token, what was written, its row of the inverse inside its
chunk, and two rows' worth of states: 5 P numbers in the inputs' type.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ahn.ops.backend import shared_memory
from ahn.ops.rule import StepRule
from ahn.ops.scan import kernel_backward as kernels
from ahn.ops.scan.kernel import CHUNK, STATE_COLUMNS, kernel_sizes, read_raw, write_all


def _stages(device: torch.device) -> int:
    """Loads of the next chunk run beside a chunk's work where shared memory holds both (103 KB at P = 128)."""
    return 2 if shared_memory(device) > 112 * 1024 else 1


class Scan(torch.autograd.Function):
    """`kernel.scan`, read left raw: (query, key, value, write, decay, state, rule, share) to (o, state)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        write: Tensor,
        decay: Tensor | None,
        state: Tensor,
        rule: StepRule,
        share: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        write = write.contiguous()
        decay, share = (None if x is None else x.contiguous() for x in (decay, share))
        sizes = kernel_sizes(query, key, value, write, decay, share)
        done = write_all(key, value, write, decay, state, rule, sizes, keep=True)
        kept = done.written, done.states, done.from_k, done.inverse
        ctx.save_for_backward(query, key, value, write, decay, share, *kept)
        ctx.rule, ctx.sizes = rule, sizes
        return read_raw(query, key, decay, share, done, rule, sizes), done.state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, write, decay, share, written, states, from_k, inverse = ctx.saved_tensors
        rule, sizes = ctx.rule, ctx.sizes
        B, HEADS, tokens = write.shape
        P = key.shape[3]
        chunks = triton.cdiv(tokens, CHUNK)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_state = grad_state.clone(memory_format=torch.contiguous_format)
        read = (*query.stride()[:3], *key.stride()[:3], *grad.stride()[:3])
        grad_written, grad_states = torch.empty_like(written), torch.empty_like(states)
        kernels.local_writes[chunks, B * HEADS](
            query, key, decay, share, grad, grad_written, tokens, *read, rule.l2_eps, rule.scale, **sizes, num_warps=8
        )  # fmt: skip
        columns = min(STATE_COLUMNS, P)
        kernels.states_backward[P // columns, B * HEADS](
            query, key, decay, share, from_k, grad, grad_written, grad_states, grad_state, tokens, chunks, *read,
            rule.l2_eps, rule.scale, COLUMNS=columns, DELTA=rule.delta, **sizes, num_warps=4,
            num_stages=_stages(query.device),
        )  # fmt: skip
        grad_query, grad_key, grad_value = (
            torch.empty(B, heads, tokens, P, dtype=key.dtype, device=key.device)
            for heads in (query.shape[1], HEADS, HEADS)
        )
        from_reads, grad_share = torch.empty_like(write), None if share is None else torch.empty_like(share)
        kernels.queries_backward[chunks, B * query.shape[1]](
            query, key, decay, share, inverse, written, states, grad, grad_written, grad_query, grad_share, from_reads,
            tokens, *read, *grad_query.stride()[:3], rule.l2_eps, rule.scale, DELTA=rule.delta, **sizes, num_warps=8,
        )  # fmt: skip
        grad_write, grad_decay = torch.empty_like(write), None if decay is None else torch.empty_like(decay)
        kernels.through_states[chunks, B * HEADS](
            key, value, write, decay, written, states, grad_written, grad_states, from_reads,
            grad_key, grad_value, grad_write, grad_decay, tokens,
            *key.stride()[:3], *value.stride()[:3], rule.l2_eps, DELTA=rule.delta, **sizes, num_warps=8,
        )  # fmt: skip
        kernels.keys_backward[chunks, B * HEADS](
            query, key, write, decay, share, written, grad, grad_written, grad_key, grad_write, grad_decay, tokens,
            *read, rule.l2_eps, rule.scale, DELTA=rule.delta, **sizes, num_warps=8,
        )  # fmt: skip
        grads = [
            found if x.shape[1] == HEADS else found.unflatten(1, (x.shape[1], -1)).sum(2)
            for found, x in ((grad_key, key), (grad_value, value))
        ]
        return grad_query, *grads, grad_write, grad_decay, grad_state, None, grad_share

"""A recurrence over many tokens: `delta_rule` and `decay_rule` alone, `write_and_read` with what stands around them.

`reference` has the equations, `chunked` is the same in matrix products, `kernel` and its gradients run on a GPU; this
module is the one place that chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ahn.errors import AHNError
from ahn.ops import backend
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.scan import chunked, reference

__all__ = ["decay_rule", "delta_rule", "has_kernel", "with_read", "write", "write_and_read"]


def _choose(length: int) -> ModuleType:
    """The implementation for that many tokens."""
    name = backend.forced() or ("reference" if length == 1 else "chunked")  # one step is already its plainest form
    return chunked if name == "chunked" else reference


def _kernel_dtype(x: Tensor) -> torch.dtype:
    """What kernels would multiply x in: autocast's type where there is one, as for any matrix product."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def has_kernel(query: Tensor) -> bool:
    """Whether `write_and_read` can do this: on a GPU, in half precision, and in bfloat16 where there may be gradients.

    Args:
        query: (B, Hq, m, P).
    """
    P, dtype = query.shape[-1], _kernel_dtype(query)
    # The gradients of a long scan leave float16's range; float32 without tensor cores is not worth a kernel.
    fits = dtype == torch.bfloat16 or (dtype == torch.float16 and not torch.is_grad_enabled())
    fits = fits and query.is_cuda and P in (64, 128)  # narrower heads: see `kernel.STATE_COLUMNS`
    return fits and backend.forced() is None and backend.has_triton()


def write_and_read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    decay: Tensor | None,
    state: Tensor,
    rule: StepRule,
    read: StepRead,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A memory's whole work on many tokens, in kernels, with gradients.

    Args:
        query: (B, Hq, m, P) of the memory, after RoPE.
        key, value: (B, Hkv, m, P).
        write, decay: (B, Hq, m) float32 gates; with routes (B, Hkv, m), and no decay.
        state: (B, Hq, P, P) float32 before the first write; with routes (B, Hkv · R, P, P).
        read: with gamma (B, Hq, m) and weight (B or 1, Hq, m); its `query` is not used.
        exact: (B, n, Hq, P) what exact attention gives, or None.

    Returns:
        `exact` with the reads added in its last m tokens, or where there is none the finished reads (B, Hq, m, P) in
        the type that kernels multiply in; and the state after the last write.
    """
    from ahn.ops.scan import finish_kernel, gradients, kernel

    if read.routes is not None and decay is not None:
        raise AHNError("A memory with several states per head has no decay in these kernels; give it no `step_rule`.")
    dtype = _kernel_dtype(key)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.cuda.device(query.device):
        share = None
        if read.routes is not None:
            key, write = _lightly(read.routes.keys, key, write)
            query, share = _lightly(read.routes.queries, query)
        if not torch.is_grad_enabled() and not rule.across_heads:
            finished, state = kernel.scan(query, key, value, write, decay, state, rule, read, share)
            return with_read(exact, finished), state
        if torch.is_grad_enabled():
            o, state = gradients.Scan.apply(query, key, value, write, decay, state, rule, share)
        else:
            o, state = kernel.scan(query, key, value, write, decay, state, rule, None, share)
        if exact is not None and finish_kernel.adds(rule, read):
            parts = read.gamma, read.norm, read.o_proj
            return finish_kernel.AddedRead.apply(exact, o, *parts, rule), state
        return with_read(exact, finish_kernel.finish(o, rule, read)), state


def write(
    key: Tensor, value: Tensor, gate: Tensor, decay: Tensor | None, state: Tensor, rule: StepRule, routes: Routes | None
) -> Tensor:
    """The state after m tokens, as `write_and_read` has it, in kernels, without gradients; arguments as there."""
    from ahn.ops.scan import kernel

    if routes is not None:
        key, gate = routes.keys(key, gate)
    gate, decay = gate.contiguous(), None if decay is None else decay.contiguous()
    with torch.cuda.device(key.device):
        sizes = kernel.kernel_sizes(key, key, value, gate, decay, None)
        return kernel.write_all(key, value, gate, decay, state, rule, sizes).state


def with_read(exact: Tensor | None, read: Tensor) -> Tensor:
    """Exact attention (B, n, Hq, P) with what the last m queries read (B, Hq, m, P), or the read alone."""
    if exact is None:
        return read
    first = exact.shape[1] - read.shape[2]
    added = exact[:, first:] + read.transpose(1, 2).to(exact.dtype)
    return torch.cat([exact[:, :first], added], dim=1) if first else added


def _lightly(function: Callable[..., Any], *arguments: Tensor) -> Any:
    """The function's result; for gradients only the arguments are kept, not its float32 numbers in between."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _in_full_precision(device: torch.device) -> torch.autocast:
    """Autocast would run the matrix products of a recurrence in bfloat16 and lose the state's precision."""
    return torch.autocast(device.type, enabled=False)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule over N tokens in the state's precision; see `reference.delta_rule`."""
    q, k, v, beta = (x.to(state.dtype) for x in (q, k, v, beta))
    decay = None if decay is None else decay.to(state.dtype)
    with _in_full_precision(q.device):
        return _choose(q.shape[2]).delta_rule(q, k, v, beta, decay, state)


def decay_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The decaying sum of outer products over N tokens in the state's precision; see `reference.decay_rule`."""
    q, k, v, decay = (x.to(state.dtype) for x in (q, k, v, decay))
    with _in_full_precision(q.device):
        return _choose(q.shape[2]).decay_rule(q, k, v, decay, state)

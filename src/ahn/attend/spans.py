"""Exact attention in which every key is visible for a span of queries: windows, sinks and keys that stay longer.

`plain` writes the mask out, in plain torch on any device; `ahn.attend.spans_kernel` visits only the blocks that
somebody sees. `attend` chooses. Both have gradients.

Shapes: B rows, Hq query heads, Hkv key/value heads, n queries, T keys, P head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ahn.attend.part import Part
from ahn.attend.spans_blocks import Columns
from ahn.errors import AHNError
from ahn.ops import has_triton


def supported(query: Tensor) -> bool:
    """Whether the kernels can do this query (B, Hq, n, P); everything else runs in plain torch."""
    P = query.shape[-1]
    known = query.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not (query.is_cuda and known and 16 <= P <= 128 and P & (P - 1) == 0 and has_triton()):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend(query: Tensor, key: Tensor, value: Tensor, until: Tensor | Columns, scaling: float) -> Tensor:
    """Attention of n queries over T keys, the last n of which are the queries' own tokens.

    Column c is the own token of query c - (T - n), and visible to that query and the following ones before `until[c]`;
    columns before T - n precede all queries.

    Args:
        query: (B, Hq, n, P); key, value: (B, Hkv, T, P) of the same type.
        until: (B or 1, Hkv or 1, T) int32, the index of the first query that does not see the column any more; as
            `Columns` where other layers use the same.
        scaling: of the scores, positive.

    Returns:
        (B, Hq, n, P), laid out as (B, n, Hq, P); zeros for a query that sees nothing. Gradients flow to query, key
        and value.

    Raises:
        AHNError: shapes, types or devices that do not fit each other.
    """
    columns = until if isinstance(until, Columns) else Columns(until, query.shape[2])
    _check(query, key, value, columns.until, scaling)
    if torch.is_autocast_enabled(query.device.type):  # as torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise AHNError(f"query, key and value have different types: {query.dtype}, {key.dtype}, {value.dtype}.")
    if supported(query):
        with torch.cuda.device(query.device):
            return Spans.apply(query, key, value, columns, scaling)
    return plain(query, key, value, columns.until, scaling)


def part(query: Tensor, key: Tensor, value: Tensor, columns: Columns, scaling: float) -> Part:
    """`attend` without gradients, with the log-sum-exp of the scores; minus infinity for who sees nothing."""
    _check(query, key, value, columns.until, scaling)
    if not supported(query):
        return plain_part(query, key, value, columns.until, scaling)
    from ahn.attend import spans_kernel

    with torch.cuda.device(query.device):
        out, score = spans_kernel.forward(query, key, value, columns, scaling)
    return Part(out, torch.where(score == torch.inf, -torch.inf, score * math.log(2)))


def _check(query: Tensor, key: Tensor, value: Tensor, until: Tensor, scaling: float) -> None:
    B, Hq, n, P = query.shape
    Hkv, T = key.shape[1:3]
    if key.shape != value.shape or key.shape != (B, Hkv, T, P) or Hq % Hkv or n > T:
        raise AHNError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} are not "
            "(B, Hq, n, P) and twice (B, Hkv, T, P) with Hq a multiple of Hkv and T >= n."
        )
    if scaling <= 0:
        raise AHNError(f"scaling is {scaling}; it must be positive.")
    fits = until.dim() == 3 and until.shape[0] in (1, B) and until.shape[1] in (1, Hkv) and until.shape[2] == T
    if not fits or until.dtype != torch.int32:
        raise AHNError(
            f"until is {tuple(until.shape)} of {until.dtype}, not ({B} or 1, {Hkv} or 1, {T}) of torch.int32."
        )
    devices = {str(x.device) for x in (query, key, value, until)}
    if len(devices) > 1:
        raise AHNError(f"Arguments are on different devices: {', '.join(sorted(devices))}.")


def visible(until: Tensor, n: int) -> Tensor:
    """The mask (B or 1, Hkv or 1, n, T) that `until` (B or 1, Hkv or 1, T) stands for; True: query i sees column c."""
    T = until.shape[-1]
    i = torch.arange(n, device=until.device)[:, None]
    own = torch.arange(T, device=until.device) - (T - n)
    return (own <= i) & (i < until[..., None, :])


def plain(query: Tensor, key: Tensor, value: Tensor, until: Tensor, scaling: float) -> Tensor:
    """`attend` with the scores written out, in float32 at least."""
    return plain_part(query, key, value, until, scaling).out


def plain_part(query: Tensor, key: Tensor, value: Tensor, until: Tensor, scaling: float) -> Part:
    """`part` with the scores written out, in float32 at least; with gradients."""
    n, Hkv = query.shape[2], key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(exact).unflatten(1, (Hkv, -1))
    scores = grouped @ key.to(exact).mT[:, :, None] * scaling
    seen = visible(until, n)[:, :, None]
    weights = scores.masked_fill(~seen, torch.finfo(exact).min).softmax(-1).masked_fill(~seen, 0)
    out = (weights @ value.to(exact)[:, :, None]).flatten(1, 2).to(query.dtype)
    score = scores.masked_fill(~seen, -torch.inf).logsumexp(-1).flatten(1, 2)
    return Part(out.transpose(1, 2).contiguous().transpose(1, 2), score)


class Spans(torch.autograd.Function):
    """The kernels of `ahn.attend.spans_kernel`; arguments are those of `attend`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, columns: Columns, scaling: float) -> Tensor:
        """(B, Hq, n, P)."""
        from ahn.attend import spans_kernel

        out, score = spans_kernel.forward(query, key, value, columns, scaling)
        ctx.save_for_backward(query, key, value, out, score)
        ctx.columns, ctx.scaling = columns, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of query, key and value, as far as they are wanted."""
        from ahn.attend import spans_kernel_backward as kernels
        from ahn.attend.spans_kernel import by_rows

        query, key, value, out, score = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        gradient = by_rows(gradient)
        delta = kernels.delta(out, gradient)
        common = (query, key, value, ctx.columns, ctx.scaling, score, gradient, delta)
        of_query = kernels.queries(*common) if wanted[0] else None
        of_key, of_value = kernels.keys(*common) if wanted[1] or wanted[2] else (None, None)
        return of_query, of_key, of_value, None, None


class WithPart(torch.autograd.Function):
    """x (B, H, T, P), and its tokens from `first` up to `last`, to `attend` and whoever else reads only these.

    Both gradients become one in place. Autograd itself would fill a tensor with zeros, copy the part's into it, and add
    it to the other. `attend` must be the only one to use the whole: then its gradient is nobody else's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Both as views of x."""
        ctx.tokens = slice(first, last)
        return x.view_as(x), x[:, :, first:last]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, whole: Tensor, part: Tensor) -> tuple[Tensor, None, None]:
        """Of x."""
        whole[:, :, ctx.tokens].add_(part)
        return whole, None, None

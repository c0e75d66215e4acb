"""Arguments of scans, and what the recurrences and autograd in float64 make of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from golden import relative_error
from torch import Tensor

from ahn.ops.rule import StepRead, StepRule
from ahn.ops.scan import reference
from ahn.ops.step.reference import read_out
from support.kernels import DEVICE, RULES

# Float32 with full-precision products: a chunk's system of 64 equations, sums of 64 terms in another order.
FLOAT32 = 2e-5


def expected(query, key, value, write, decay, state, rule, read, share=None):
    """Float64, through `ahn.ops.scan.reference`; each query reads states of its own, be they copies."""
    query, key, value, write, decay, state, share = (
        None if x is None else x.double() for x in (query, key, value, write, decay, state, share)
    )
    key, value = (x.repeat_interleave(write.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if share is not None:
        states = share.shape[3]
        groups = query.shape[1] * states // write.shape[1]
        query = query.repeat_interleave(states, dim=1)
        key, value, write, state = (
            x.unflatten(1, (-1, states)).repeat_interleave(groups, dim=1).flatten(1, 2)
            for x in (key, value, write, state)
        )
    q = query * torch.rsqrt(query.square().sum(-1, keepdim=True) + rule.l2_eps) * rule.scale
    k = key * torch.rsqrt(key.square().sum(-1, keepdim=True) + rule.l2_eps)
    if rule.delta:
        o, state = reference.delta_rule(q, k, value, write, decay, state)
    else:
        o, state = reference.decay_rule(q, k, value * write[..., None], decay, state)
    if share is not None:
        o = (o.unflatten(1, (-1, states)) * share.movedim(3, 2)[..., None]).sum(2)
        state = state.unflatten(1, (-1, groups, states))[:, :, 0].flatten(1, 2)
    if read is None:
        return o, state
    B, H, m, P = o.shape
    merged = o.transpose(1, 2).reshape(B * m, H, P)
    flat = StepRead(
        merged,
        *(x.double().expand(B, H, m).transpose(1, 2).reshape(B * m, H) for x in (read.gamma, read.weight)),
        read.norm.double(),
        read.o_proj.double(),
    )
    return read_out(merged, rule, flat).double().view(B, m, H, P).transpose(1, 2), state


def several_states(
    tokens: int, P: int, dtype: torch.dtype, kv_heads: int = 2, groups: int = 3, states: int = 4
) -> dict[str, torch.Tensor | None]:
    """Arguments of a scan with several states for each key head, which `groups` query heads read."""
    r = torch.Generator().manual_seed(tokens)
    heads = {"query": kv_heads * groups, "key": kv_heads, "value": kv_heads}
    given: dict[str, torch.Tensor | None] = {
        name: torch.randn(2, tokens, count, P, generator=r).to(dtype).transpose(1, 2) for name, count in heads.items()
    }
    given["write"] = torch.rand(2, kv_heads * states, tokens, generator=r)
    given["decay"] = None
    given["state"] = 0.1 * torch.randn(2, kv_heads * states, P, P, generator=r)
    given["share"] = torch.rand(2, kv_heads * groups, tokens, states, generator=r)
    return given


GATES = {"usual": (0.0, 0.25), "forgets": (2.0, 30.0), "keeps": (-2.0, 1e-4), "closed": (-torch.inf, 0.0)}


def inputs(
    name: str, tokens: int, heads: int, kv_heads: int, P: int, dtype: torch.dtype, gates: str = "usual"
) -> dict[str, Tensor | None]:
    """Arguments of a scan for two rows, strided as a model has them; half of all keys nearly repeat."""
    r = torch.Generator().manual_seed(tokens + P)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r)

    opened, forgotten = GATES[gates]
    key = normal(2, kv_heads, tokens + 7, P)
    key[:, :, tokens // 2 :] = key[:, :, :1] + 0.1 * key[:, :, tokens // 2 :]
    return {
        "query": normal(2, tokens, heads, P).to(dtype).transpose(1, 2),
        "key": key.to(dtype)[:, :, 5 : 5 + tokens],
        "value": normal(2, kv_heads, tokens + 7, P).to(dtype)[:, :, 5 : 5 + tokens],
        "write": torch.sigmoid(normal(2, heads, tokens) + opened),
        "decay": -F.softplus(normal(2, heads, tokens)) * forgotten if RULES[name].decay else None,
        "state": 0.3 * normal(2, heads, P, P),
    }


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    arguments: dict[str, Tensor | None],
    rule: StepRule,
    weights: list[Tensor],
) -> dict[str, Tensor]:
    """Read, state, and the gradients of their sum under these weights."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in arguments.items()}
    share = leaves.pop("share", None)
    outputs = function(*leaves.values(), rule, share)
    sum((x * weight.to(x)).sum() for x, weight in zip(outputs, weights, strict=True)).backward()
    gradients = {f"grad_{name}": x.grad for name, x in (leaves | {"share": share}).items() if x is not None}
    return {"o": outputs[0].detach(), "state": outputs[1].detach()} | gradients


def errors_of(name: str, arguments: dict[str, Tensor | None], read: float = 1.0) -> dict[str, float]:
    """Relative to each tensor's norm, or to 1 where it is smaller: terms that cancel leave their rounding behind."""
    from ahn.ops.scan.gradients import Scan

    rule, r = RULES[name], torch.Generator().manual_seed(1)
    weights = [torch.randn(arguments[name].shape, generator=r) for name in ("query", "state")]
    weights[0] *= read
    exact = {part: None if x is None else x.double() for part, x in arguments.items()}
    wanted = outputs_and_gradients(lambda *x: expected(*x[:-1], None, x[-1]), exact, rule, weights)
    moved = {part: None if x is None else x.to(DEVICE) for part, x in arguments.items()}
    found = outputs_and_gradients(Scan.apply, moved, rule, weights)
    assert all(found[f"grad_{part}"].dtype == x.dtype for part, x in arguments.items() if x is not None)
    return {
        part: relative_error(found[part].double().cpu(), x) * min(1.0, float(x.norm())) for part, x in wanted.items()
    }

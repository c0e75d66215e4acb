"""`ahn.ops.routes` in a decoding step: a kernel maps one query and one leaving key per head, and shares them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.routes import L2_EPS, SHARPNESS, Routes
from ahn.ops.step.dependent_launch import announce, wait
from ahn.ops.step.head_kernel import finished_head, slot_of


@dataclasses.dataclass
class Routed:
    """Unit vectors in float32, the query's times the rule's scale, and what each state gets of them.

    Attributes:
        query, query_share: (B, Hq, P) and (B, Hq, R).
        key, key_share: (B, Hkv, P) and (B, Hkv, R).
    """

    query: Tensor
    key: Tensor
    query_share: Tensor
    key_share: Tensor


@triton.jit
def _route(
    query, key, gone, positions, query_norm, cos, sin, query_eps, stride_turn,
    query_map, key_map, query_route, key_route, out, share, rows,
    slots, sinks, l2_eps, scale, sharpness, route_eps, stride_kb, stride_kh, stride_kt,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, STATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One of `rows` queries or, in the programs after them, a key: of a head, what a token brings or leaves behind."""
    announce(PDL)
    row, keyed = tl.program_id(0), tl.program_id(0) >= rows
    b, h = row // HEADS, row % HEADS
    p, r = tl.arange(0, P), tl.arange(0, STATES)
    matrix, route = query_map, query_route
    if keyed:
        row -= rows
        b, h = row // (HEADS // GROUPS), row % (HEADS // GROUPS)
        matrix, route = key_map, key_route
    M = tl.load(matrix + h * P * P + p[:, None] * P + p[None, :])
    A = tl.load(route + h * P * STATES + p[:, None] * STATES + r[None, :]).to(tl.float32)
    wait(PDL)
    if keyed:
        if gone is None:
            slot = slot_of(tl.load(positions + b), sinks, slots - sinks)
            key += b.to(tl.int64) * stride_kb + h * stride_kh + slot * stride_kt
            x = tl.load(key + p).to(tl.float32)
        else:
            x = tl.load(gone + row * P + p).to(tl.float32)
    else:
        if cos is not None:
            cos += b * stride_turn
            sin += b * stride_turn
        x = finished_head(query + row * P, p < P, query_norm, query_eps, cos, sin, P).to(tl.float32)
    y = x + tl.sum(x[:, None] * M.to(tl.float32), 0)
    size = tl.sum(y * y)
    logits = sharpness * tl.rsqrt(size + route_eps) * tl.sum(y[:, None] * A, 0)
    e = tl.exp(logits - tl.max(logits, 0))
    tl.store(share + tl.program_id(0) * STATES + r, e / tl.sum(e, 0))
    y *= tl.rsqrt(size + l2_eps) * tl.where(keyed, 1.0, scale)
    tl.store(out + tl.program_id(0) * P + p, y)


def route(
    query: Tensor,
    keys: Tensor,
    gone: Tensor | None,
    positions: Tensor,
    turn: tuple[Any, ...],
    routes: Routes,
    sinks: int,
    l2_eps: float,
    scale: float,
    launch: Mapping[str, Any],
) -> Routed:
    """Map and share out.

    Args:
        query: (B, Hq, P), unfinished.
        keys: (B, Hkv, T, P) slots, of which one leaves; or `gone`: (B, Hkv, P), what left instead.
        turn: norm, cos, sin, eps and the stride of the angles, of queries.
    """
    B, HEADS, P = query.shape
    rows, all_rows = B * HEADS, B * (HEADS + keys.shape[1])
    out = torch.empty(all_rows, P, dtype=torch.float32, device=query.device)
    share = torch.empty(all_rows, routes.states, dtype=torch.float32, device=query.device)
    _route[(all_rows,)](
        query, keys, gone, positions, *turn, routes.query_map, routes.key_map, routes.query_route, routes.key_route,
        out, share, rows, keys.shape[2], sinks, l2_eps, scale, SHARPNESS, L2_EPS, *keys.stride()[:3],
        HEADS=HEADS, GROUPS=HEADS // keys.shape[1], P=P, STATES=routes.states, num_warps=8, **launch,
    )  # fmt: skip
    return Routed(out[:rows], out[rows:], share[:rows], share[rows:])

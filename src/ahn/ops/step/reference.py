"""One decoding step of a layer over fixed slots: attend, write what leaves into the memory, read, keep the new token.

`step` is the plain torch form, any device; `ahn.ops.step.kernel` is the same in two kernels. Both change the buffers of
`StepBuffers` in place. `ahn.ops.step.operator` chooses, as an operator that torch.compile leaves whole.

With quantized tokens the one that leaves the window goes into a ring of codes (`ahn.cache.quantized`), and the memory
gets the one that leaves the ring.

Shapes: B rows, Hq query heads, Hkv key/value heads, Hw heads that write (Hkv with routes, else Hq), P head dim,
S sinks, W window, T = S + W, C quantized tokens.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.ops.gate import Gate
from ahn.ops.quantize import decode, encode, precise
from ahn.ops.routes import Routes, joined, repeated
from ahn.ops.rule import StepRead, StepRule


@dataclasses.dataclass
class StepCodes:
    """A layer's ring of quantized tokens: the one at position p of its row lies in slot (p - S) mod C.

    Attributes:
        keys, values: (B, Hkv, C, P / 4) uint8, codes as `ahn.ops.quantize.encode` gives them.
        key_scales, value_scales: (B, Hkv, C) bfloat16.
        key_offset, value_offset: (B, Hkv, P) float32, the mean of the row's first window; zero until its first token
            leaves the window.
        write, decay: (B, Hw, C) gates of the same tokens, where the memory has them.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor
    key_offset: Tensor
    value_offset: Tensor
    write: Tensor | None
    decay: Tensor | None


@dataclasses.dataclass
class StepBuffers:
    """What a layer keeps between steps, in slots (see `ahn.layout.slots.Slots`).

    Attributes:
        keys, values: (B, Hkv, T, P).
        write, decay: (B, Hw, T) gates of the same tokens, where the memory has them.
        state: (B, Hw · R, P, P) float32, where there is a memory, with R states a head that writes.
        codes: of quantized tokens, where there are any.
    """

    keys: Tensor
    values: Tensor
    write: Tensor | None
    decay: Tensor | None
    state: Tensor | None
    codes: StepCodes | None = None


@dataclasses.dataclass
class StepRotation:
    """What queries and keys still have to go through: an RMSNorm of each head where there is one, then RoPE.

    Attributes:
        cos, sin: (B or 1, ..., P) of the new token, as the base model's rotary embedding gives them.
        query_norm, key_norm: (P,) weights, or None.
        query_eps, key_eps: of these norms.
    """

    cos: Tensor
    sin: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    query_eps: float = 0.0
    key_eps: float = 0.0


def supported(head_dim: int) -> bool:
    """Whether the kernels can work on this head dim."""
    return 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Gate | None,
    decay: Gate | None,
    positions: Tensor,
    active: Tensor,
    buffers: StepBuffers,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    read: StepRead | None,
    rotation: StepRotation | None = None,
) -> Tensor:
    """One token a row. A row that is not `active` changes nothing; its output means nothing.

    Args:
        query: (B, Hq, P); key, value: (B, Hkv, P) of the new token.
        write, decay: (B, Hw) gates of the new token.
        positions: (B,) int64, tokens that each row has read before.
        active: (B,) bool.
        sinks: S.
        scaling: of attention scores.
        rule, read: None without a memory.
        rotation: of all queries and the key; None where they come rotated.

    Returns:
        (B, Hq, P): attention over sinks, window and quantized tokens, plus the memory's read.
    """
    memory_query = None if read is None else read.query
    if rotation is not None:
        turn = rotation.cos, rotation.sin
        if memory_query is not None:
            memory_query = _rotated(memory_query, *turn, rotation.query_norm, rotation.query_eps)
        query = _rotated(query, *turn, rotation.query_norm, rotation.query_eps)
        key = _rotated(key, *turn, rotation.key_norm, rotation.key_eps)
    T = buffers.keys.shape[2]
    window = T - sinks
    slot = torch.where(positions < T, positions, sinks + (positions - sinks) % window)
    leaves = active & (positions >= T)
    rows = torch.arange(len(positions), device=positions.device)
    leaving = [
        None if x is None else _where(leaves, x[rows, :, slot])
        for x in (buffers.keys, buffers.values, buffers.write, buffers.decay)
    ]
    if buffers.codes is not None:
        leaving = _push(leaving, leaves, positions, buffers, sinks)
    memory_read: Tensor | float = 0.0
    if rule is not None and read is not None and memory_query is not None:
        gone_key, gone_value, strength, fade = (None if x is None else x.float() for x in leaving)
        assert gone_key is not None and gone_value is not None and strength is not None and buffers.state is not None
        token = memory_query, gone_key, gone_value, strength, fade
        o = _write_and_read(*token, buffers.state, rule, read.routes)
        memory_read = _read_out(o, rule, read)
    mine = active[:, None]
    kept = (buffers.keys, key), (buffers.values, value), (buffers.write, _value(write)), (buffers.decay, _value(decay))
    for ring, new in kept:
        if ring is not None and new is not None:
            fits = mine.reshape(mine.shape + (1,) * (new.dim() - 2))
            ring[rows, :, slot] = torch.where(fits, new.to(ring.dtype), ring[rows, :, slot])
    visible = torch.arange(T, device=slot.device) <= positions[:, None]
    keys, values = (torch.where(visible[:, None, :, None], x, 0) for x in (buffers.keys, buffers.values))
    if buffers.codes is not None:
        coded, held = _decoded(buffers.codes, positions - T + 1, keys.dtype)
        keys, values = (torch.cat(pair, dim=2) for pair in zip((keys, values), coded, strict=True))
        visible = torch.cat([visible, held], dim=1)
    out = F.scaled_dot_product_attention(
        query[:, :, None], keys, values, visible[:, None, None], scale=scaling, enable_gqa=True
    )
    return (out[:, :, 0].to(precise(query.dtype)) + memory_read).to(query.dtype)


def _where(rows: Tensor, x: Tensor, other: Tensor | float = 0) -> Tensor:
    """x (B, ...) in these rows (B,), something else in others."""
    return torch.where(rows.reshape(-1, *[1] * (x.dim() - 1)), x, other)


def _push(
    leaving: list[Tensor | None], leaves: Tensor, positions: Tensor, buffers: StepBuffers, sinks: int
) -> list[Tensor | None]:
    """Put what leaves the window into the ring of codes; returns what leaves that, of rows from which something does.

    Args:
        leaving: key, value (B, Hkv, P), write and decay (B, Hw) or None.
        leaves: (B,) rows from which a token leaves the window.
    """
    codes, T = buffers.codes, buffers.keys.shape[2]
    assert codes is not None
    capacity = codes.keys.shape[2]
    slot, begins = (positions - T) % capacity, leaves & (positions == T)
    gone = leaves & (positions >= T + capacity)
    rows = torch.arange(len(positions), device=positions.device)
    left: list[Tensor | None] = []
    for x, window, ring, scales, offset, unbiased in (
        (leaving[0], buffers.keys, codes.keys, codes.key_scales, codes.key_offset, True),
        (leaving[1], buffers.values, codes.values, codes.value_scales, codes.value_offset, False),
    ):
        assert x is not None
        kind = precise(x.dtype)
        offset.copy_(_where(begins, window[:, :, sinks:].to(kind).mean(2).float(), offset))
        old = decode(ring[rows, :, slot], scales[rows, :, slot], x.dtype) + offset
        left.append(_where(gone, old.to(x.dtype)))
        new = encode(x.to(kind) - offset, unbiased)
        for kept, part in zip((ring, scales), new, strict=True):
            kept[rows, :, slot] = _where(leaves, part, kept[rows, :, slot])
    for gate, waiting in ((leaving[2], codes.write), (leaving[3], codes.decay)):
        left.append(None if waiting is None else _where(gone, waiting[rows, :, slot]))
        if gate is not None and waiting is not None:
            waiting[rows, :, slot] = _where(leaves, gate, waiting[rows, :, slot])
    return left


def _decoded(codes: StepCodes, count: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Keys and values (B, Hkv, C, P) that the codes stand for, and which slots hold any (B, C), `count` (B,) in all."""
    held = torch.arange(codes.keys.shape[2], device=count.device) < count[:, None]
    decoded = []
    for ring, scales, offset in (
        (codes.keys, codes.key_scales, codes.key_offset),
        (codes.values, codes.value_scales, codes.value_offset),
    ):
        x = (decode(ring, scales, dtype) + offset.unsqueeze(2)).to(dtype)
        decoded.append(torch.where(held[:, None, :, None], x, 0))
    return decoded, held


def _value(gate: Gate | None) -> Tensor | None:
    return None if gate is None else gate.value()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """x (B, H, P) through its norm and RoPE, rounded once."""
    y = x.float()
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.float()
    first, second = y.chunk(2, dim=-1)
    cos, sin = (part.float().view(-1, 1, x.shape[-1]) for part in (cos, sin))
    return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _write_and_read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    decay: Tensor | None,
    state: Tensor,
    rule: StepRule,
    routes: Routes | None,
) -> Tensor:
    """Write one token (B, Hkv, P) into the states in place, then read them raw: queries' shape, float32."""
    if routes is not None:
        heads = key.shape[1]
        mapped, strength = routes.keys(key.unsqueeze(2), write.unsqueeze(2))
        query, share = routes.queries(query.to(precise(query.dtype)).unsqueeze(2))
        query = repeated(query[:, :, 0], heads, routes.states)
        o = _write_and_read(query, mapped[:, :, 0], value, strength[:, :, 0], decay, state, rule, None)
        return joined(o.unsqueeze(2), share, heads)[:, :, 0]
    key, value = (x.repeat_interleave(state.shape[1] // x.shape[1], dim=1) for x in (key, value))
    k_hat, q_hat = (x.float() * _inverse_norm(x, rule.l2_eps) for x in (key, query))
    if decay is not None:
        state *= decay.exp()[..., None, None]
    if rule.delta:
        value = value - torch.einsum("bhkv,bhk->bhv", state, k_hat)
    state += k_hat[..., :, None] * (write[..., None] * value)[..., None, :]
    readers = q_hat.unflatten(1, (state.shape[1], -1))
    return torch.einsum("bhkv,bhgk->bhgv", state, readers).flatten(1, 2) * rule.scale


def _inverse_norm(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().square().sum(-1, keepdim=True) + eps)


def _read_out(o: Tensor, rule: StepRule, read: StepRead) -> Tensor:
    """Norm, gate and the projection of each head, of a raw read o (B, Hq, P): float32 of the same shape."""
    B, H, P = o.shape
    gate = F.silu(read.gamma.float())[..., None]
    if rule.across_heads:
        o = (o * gate).reshape(B, H * P)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + rule.norm_eps) * read.norm.float()
    o = o.view(B, H, P) if rule.across_heads else o * gate
    projected = torch.einsum("bhk,hkv->bhv", o.to(read.o_proj.dtype), read.o_proj).float()
    return projected if read.weight is None else projected * read.weight[..., None]

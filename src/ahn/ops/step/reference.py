"""One decoding step of a layer over fixed slots: attend, write what leaves into the memory, read, keep the new token.

`step` is the plain torch form, any device; `ahn.ops.step.kernel` is the same in two kernels. Both change the tensors of
a `LayerState` in place. `ahn.ops.step.operator` chooses, as an operator that torch.compile leaves whole.

With a low-bit tier the token that leaves the window goes into the tier (`ahn.cache.tier`), and the memory gets the one
that leaves the tier.

Shapes: B rows, Hq query heads, Hkv key/value heads, Hw heads that write (Hkv with routes, else Hq), P head dim,
S sinks, W window, T = S + W, C tokens of the tier.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.layout.state import LayerState, Tensors, TierRing, TierState, WindowState
from ahn.ops.basis import Basis
from ahn.ops.gate import Gate
from ahn.ops.quantize import decode, encode, precise
from ahn.ops.routes import Routes, joined, repeated
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step.product import FEW
from ahn.ops.step.retained import SeenTokens
from ahn.ops.step.turn import TierTurn, turned


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


def by_steps(tokens: int, routed: bool) -> bool:
    """Whether kernels write what this many new tokens replace one after the other, and rotate by themselves."""
    return tokens <= FEW and not routed


def supported(head_dim: int, turning: bool = False) -> bool:
    """Whether the kernels can work on this head dim, or also turn keys of the tier."""
    return (32 if turning else 16) <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Gate | None,
    decay: Gate | None,
    positions: Tensor,
    active: Tensor,
    state: LayerState,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    read: StepRead | None,
    rotation: StepRotation | None = None,
    turn: TierTurn | None = None,
    seen: SeenTokens | None = None,
    basis: Basis | None = None,
) -> Tensor:
    """One token per row. A row that is not `active` changes nothing; its output means nothing.

    Args:
        query: (B, Hq, P); key, value: (B, Hkv, P) of the new token.
        write, decay: (B, Hw) gates of the new token; with `seen` its score, (B, Hkv), is `write`.
        positions: (B,) int64, tokens that each row has read before.
        active: (B,) bool.
        state: of the layer, its window in slots; its gates and the memory's "state", (B, Hw · R, P, P) float32 with R
            states per head that writes, are there where `rule` is.
        sinks: S.
        scaling: of attention scores.
        rule, read: None without a memory.
        rotation: of all queries and the key; None where they come rotated.
        turn: of the tier's keys, which are kept as before RoPE; None where they are kept as they leave the window.
        seen: tokens that the memory keeps, if it is one that does.
        basis: in which keys of the tier are coded, if not in that of the Hadamard rotation.

    Returns:
        (B, Hq, P): attention over sinks, window and tier, plus the memory's read.
    """
    memory_query = None if read is None else read.query
    if rotation is not None:
        angles = rotation.cos, rotation.sin
        if memory_query is not None:
            memory_query = rotated(memory_query, *angles, rotation.query_norm, rotation.query_eps)
        query = rotated(query, *angles, rotation.query_norm, rotation.query_eps)
        key = rotated(key, *angles, rotation.key_norm, rotation.key_eps)
    window, tier = state.window, state.tier
    T = window.keys.shape[2]
    slot = torch.where(positions < T, positions, sinks + (positions - sinks) % (T - sinks))
    leaves = active & (positions >= T)
    rows = torch.arange(len(positions), device=positions.device)
    write_ring, decay_ring = gates_of(window.gates, rule)
    leaving = [
        None if x is None else _where(leaves, x[rows, :, slot])
        for x in (window.keys, window.values, write_ring, decay_ring)
    ]
    if tier is not None:
        leaving = _push(leaving, leaves, positions, window, tier, sinks, rule, turn, basis)
    memory_read: Tensor | float = 0.0
    if rule is not None and read is not None and memory_query is not None:
        gone_key, gone_value, strength, fade = (None if x is None else x.float() for x in leaving)
        assert gone_key is not None and gone_value is not None and strength is not None
        token = memory_query, gone_key, gone_value, strength, fade
        o = write_and_read_token(*token, state.memory["state"], rule, read.routes)
        memory_read = read_out(o, rule, read)
    left = positions - T - (0 if tier is None else tier.keys.codes.shape[2]) + 1
    if seen is not None:
        gone_key, gone_value, score, _ = leaving
        assert gone_key is not None and gone_value is not None and score is not None
        seen.push(gone_key, gone_value, score, left, left - 1 + sinks, active & (left > 0))
    mine = active[:, None]
    kept = (window.keys, key), (window.values, value), (write_ring, _value(write)), (decay_ring, _value(decay))
    for ring, new in kept:
        if ring is not None and new is not None:
            fits = mine.reshape(mine.shape + (1,) * (new.dim() - 2))
            ring[rows, :, slot] = torch.where(fits, new.to(ring.dtype), ring[rows, :, slot])
    visible = torch.arange(T, device=slot.device) <= positions[:, None]
    keys, values = (torch.where(visible[:, None, :, None], x, 0) for x in (window.keys, window.values))
    if tier is not None:
        held = torch.arange(tier.keys.codes.shape[2], device=slot.device) < (positions - T + 1)[:, None]
        key_of, value_of = _decoded(tier.keys, keys.dtype, basis), _decoded(tier.values, values.dtype)
        key_of = key_of if turn is None else _as_seen(key_of, positions - T, turn)
        keys, values = (
            torch.cat([x, torch.where(held[:, None, :, None], coded.to(x.dtype), 0)], dim=2)
            for x, coded in ((keys, key_of), (values, value_of))
        )
        visible = torch.cat([visible, held], dim=1)
    if seen is not None:
        sizes = (*keys.shape[:2], seen.keys.shape[2])
        more_keys, more_values = keys.new_zeros(*sizes, keys.shape[3]), values.new_zeros(*sizes, values.shape[3])
        more_keys[:, seen.heads], more_values[:, seen.heads] = seen.keys, seen.values
        keys, values = torch.cat([keys, more_keys], dim=2), torch.cat([values, more_values], dim=2)
        own = torch.full(sizes, float("-inf"), dtype=query.dtype, device=query.device)
        bias = seen.bias(left)[:, None].to(query.dtype)
        own[:, seen.heads] = bias.masked_fill(~seen.visible(left.clamp_min(0)), float("-inf"))[:, None]
        known = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, float("-inf"))
        mask = torch.cat([known[:, None].expand(-1, sizes[1], -1), own], dim=2)
        mask = mask.repeat_interleave(query.shape[1] // sizes[1], dim=1)[:, :, None]
    else:
        mask = visible[:, None, None]
    out = F.scaled_dot_product_attention(query[:, :, None], keys, values, mask, scale=scaling, enable_gqa=True)
    return (out[:, :, 0].to(precise(query.dtype)) + memory_read).to(query.dtype)


def _where(rows: Tensor, x: Tensor, other: Tensor | float = 0) -> Tensor:
    """x (B, ...) in these rows (B,), something else in others."""
    return torch.where(rows.reshape(-1, *[1] * (x.dim() - 1)), x, other)


def gates_of(gates: Tensors, rule: StepRule | None) -> tuple[Tensor | None, Tensor | None]:
    """Those of a window or a tier that the rule knows: write and decay, (B, Hw, T) each; without one, its only gate."""
    if rule is None:
        return next(iter(gates.values()), None), None
    return gates[rule.write], None if rule.decay is None else gates[rule.decay]


def named_gates(write: Tensor | None, decay: Tensor | None) -> Tensors:
    """The inverse of `gates_of`, by the names that the rules of our operators give gates."""
    return {name: x for name, x in (("write", write), ("decay", decay)) if x is not None}


def _push(
    leaving: list[Tensor | None],
    leaves: Tensor,
    positions: Tensor,
    window: WindowState,
    tier: TierState,
    sinks: int,
    rule: StepRule | None,
    turn: TierTurn | None,
    basis: Basis | None,
) -> list[Tensor | None]:
    """Put what leaves the window into the tier; returns what leaves that, of rows from which something does.

    Args:
        leaving: key, value (B, Hkv, P), write and decay (B, Hw) or None.
        leaves: (B,) rows from which a token leaves the window.
    """
    T, capacity = window.keys.shape[2], tier.keys.codes.shape[2]
    slot, begins = (positions - T) % capacity, leaves & (positions == T)
    gone = leaves & (positions >= T + capacity)
    rows = torch.arange(len(positions), device=positions.device)
    evicted: list[Tensor | None] = []
    for x, held, ring, is_key in (
        (leaving[0], window.keys, tier.keys, True),
        (leaving[1], window.values, tier.values, False),
    ):
        assert x is not None
        kind, dtype, first = precise(x.dtype), x.dtype, held[:, :, sinks:]
        x, first = x.to(kind), first.to(kind)
        if turn is not None and is_key:
            cos, sin = turn.first_window(T - sinks)
            x, first = turned(x, *_each(turn.token[:, 1])), turned(first, cos, -sin)
        ring.offset.copy_(_where(begins, first.mean(2).float(), ring.offset))
        own = basis if is_key else None
        place = TierRing(ring.codes[rows, :, slot, None], ring.scales[rows, :, slot, None], ring.offset)
        old = _decoded(place, dtype, own)[:, :, 0]
        old = old if turn is None or not is_key else turned(old, *_each(turn.token[:, 2]))
        evicted.append(_where(gone, old.to(dtype)))
        y = (x - ring.offset).unsqueeze(2)
        new = encode(y, is_key, ring.bits) if own is None else own.encode(y)
        for kept, part in zip((ring.codes, ring.scales), new, strict=True):
            kept[rows, :, slot] = _where(leaves, part[:, :, 0], kept[rows, :, slot])
    for gate, waiting in zip(leaving[2:], gates_of(tier.gates, rule), strict=True):
        evicted.append(None if waiting is None else _where(gone, waiting[rows, :, slot]))
        if gate is not None and waiting is not None:
            waiting[rows, :, slot] = _where(leaves, gate, waiting[rows, :, slot])
    return evicted


def _decoded(ring: TierRing, dtype: torch.dtype, basis: Basis | None = None) -> Tensor:
    """Keys or values (B, Hkv, C, P) that the codes stand for, float32 at least."""
    codes = ring.codes, ring.scales, dtype
    return (decode(*codes, ring.bits) if basis is None else basis.decode(*codes)) + ring.offset.unsqueeze(2)


def _as_seen(keys: Tensor, newest: Tensor, turn: TierTurn) -> Tensor:
    """Keys (B, Hkv, C, P) from before RoPE to where the new token's query sees them; `newest` (B,) is in that slot."""
    C = keys.shape[2]
    ages = (newest[:, None] - torch.arange(C, device=newest.device)) % C
    cos, sin = turn.by_age(C)[:, ages].unsqueeze(2)  # (2, B, 1, C, P / 2)
    (query_cos, query_sin) = (x.unsqueeze(2) for x in _each(turn.token[:, 0]))
    return turned(turned(keys, cos, -sin), query_cos, -query_sin)


def _each(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 2, P) for heads (B, H, P)."""
    return angles[:, 0, None], angles[:, 1, None]


def _value(gate: Gate | None) -> Tensor | None:
    return None if gate is None else gate.value()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """x (B, H, P) through its norm and RoPE, by angles of B rows or of all, rounded once."""
    y = x.float()
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.float()
    first, second = y.chunk(2, dim=-1)
    cos, sin = (part.float().view(-1, 1, x.shape[-1]) for part in (cos, sin))
    return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def write_and_read_token(
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
        o = write_and_read_token(query, mapped[:, :, 0], value, strength[:, :, 0], decay, state, rule, None)
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


def read_out(o: Tensor, rule: StepRule, read: StepRead) -> Tensor:
    """Norm, gate and the projection of each head, of a raw read o (B, Hq, P): float32 of the same shape."""
    B, H, P = o.shape
    gate = F.silu(read.gamma.float())[..., None]
    if rule.across_heads:
        o = (o * gate).reshape(B, H * P)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + rule.norm_eps) * read.norm.float()
    o = o.view(B, H, P) if rule.across_heads else o * gate
    projected = torch.einsum("bhk,hkv->bhv", o.to(read.o_proj.dtype), read.o_proj).float()
    return projected if read.weight is None else projected * read.weight[..., None]

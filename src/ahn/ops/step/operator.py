"""A decoding step of a layer as an operator that torch.compile leaves whole, on the device's best path."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ahn.layout.state import LayerState, TierRing, TierState, WindowState
from ahn.ops.basis import Basis
from ahn.ops.gate import Gate
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step.reference import StepRotation, gates_of, named_gates, step
from ahn.ops.step.retained import SeenTokens
from ahn.ops.step.turn import TierTurn

_TIER = (
    "tier_keys", "tier_key_scales", "tier_key_offset", "tier_values", "tier_value_scales", "tier_value_offset",
    "tier_write", "tier_decay",
)  # fmt: skip


_SEEN = ("seen_keys", "seen_values", "block_keys", "block_values", "seen_scores", "seen_positions")
_WRITTEN = ("keys", "values", "write_ring", "decay_ring", "state", *_TIER, *_SEEN)


@torch.library.custom_op("ahn::step", mutates_args=_WRITTEN)
def operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor | None,
    decay: Tensor | None,
    positions: Tensor,
    active: Tensor,
    keys: Tensor,
    values: Tensor,
    write_ring: Tensor | None,
    decay_ring: Tensor | None,
    state: Tensor | None,
    tier_keys: Tensor | None,
    tier_key_scales: Tensor | None,
    tier_key_offset: Tensor | None,
    tier_values: Tensor | None,
    tier_value_scales: Tensor | None,
    tier_value_offset: Tensor | None,
    tier_write: Tensor | None,
    tier_decay: Tensor | None,
    seen_keys: Tensor | None,
    seen_values: Tensor | None,
    block_keys: Tensor | None,
    block_values: Tensor | None,
    seen_scores: Tensor | None,
    seen_positions: Tensor | None,
    sinks: int,
    scaling: float,
    delta: bool,
    l2_eps: float,
    scale: float,
    norm_eps: float,
    across_heads: bool,
    memory_query: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    norm: Tensor | None,
    o_proj: Tensor | None,
    of_basis: Sequence[Tensor],
    write_activation: str = "none",
    write_shift: Tensor | None = None,
    write_log_rate: Tensor | None = None,
    decay_activation: str = "none",
    decay_shift: Tensor | None = None,
    decay_log_rate: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    query_eps: float = 0.0,
    key_eps: float = 0.0,
    query_map: Tensor | None = None,
    key_map: Tensor | None = None,
    query_route: Tensor | None = None,
    key_route: Tensor | None = None,
    token_angles: Tensor | None = None,
    within_angles: Tensor | None = None,
    near_angles: Tensor | None = None,
    first_angles: Tensor | None = None,
    near: int = 0,
    seen_angles: Tensor | None = None,
    seen_room: int = 0,
    seen_places: Tensor | None = None,
) -> Tensor:
    """`step` with every field an argument of its own, as an operator wants it.

    See `layer_step` for all but those of `StepRotation`, which `ahn.decode.fusion` gives, and of the state.
    """
    rule = read = rotation = None
    if memory_query is not None and gamma is not None and norm is not None and o_proj is not None:
        rule = StepRule("write", None if decay is None else "decay", delta, l2_eps, scale, norm_eps, across_heads)
        routes = None
        if query_map is not None and key_map is not None and query_route is not None and key_route is not None:
            routes = Routes(query_map, key_map, query_route, key_route)
        read = StepRead(memory_query, gamma, weight, norm, o_proj, routes)
    if cos is not None and sin is not None:
        rotation = StepRotation(cos, sin, query_norm, key_norm, query_eps, key_eps)
    write_gate = None if write is None else Gate(write, write_activation, write_shift, write_log_rate)
    decay_gate = None if decay is None else Gate(decay, decay_activation, decay_shift, decay_log_rate)
    tier = None
    if tier_keys is not None and tier_key_scales is not None and tier_key_offset is not None:
        assert tier_values is not None and tier_value_scales is not None and tier_value_offset is not None
        keys_of_tier = TierRing(tier_keys, tier_key_scales, tier_key_offset)
        values_of_tier = TierRing(tier_values, tier_value_scales, tier_value_offset)
        tier = TierState(keys_of_tier, values_of_tier, named_gates(tier_write, tier_decay))
    turn = None
    if token_angles is not None and within_angles is not None:
        assert near_angles is not None and first_angles is not None
        turn = TierTurn(token_angles, within_angles, near_angles, first_angles, near)
    basis = Basis(*of_basis) if of_basis else None
    seen = None
    if seen_keys is not None and seen_values is not None and block_keys is not None and block_values is not None:
        assert seen_scores is not None and seen_positions is not None
        tokens = seen_keys, seen_values, block_keys, block_values, seen_scores, seen_positions
        seen = SeenTokens(*tokens, seen_angles, seen_room, seen_places)
    layer = LayerState(WindowState(keys, values, named_gates(write_ring, decay_ring)), tier)
    if state is not None:
        layer.memory["state"] = state
    token = query, key, value, write_gate, decay_gate, positions, active
    if query.is_cuda:
        from ahn.ops.step import kernel

        with torch.cuda.device(query.device):
            return kernel.step(*token, layer, sinks, scaling, rule, read, rotation, turn, seen, basis)
    return step(*token, layer, sinks, scaling, rule, read, rotation, turn, seen, basis)


@operator.register_fake
def _(query: Tensor, *rest: object, **named: object) -> Tensor:
    return torch.empty_like(query)


def layer_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: dict[str, Gate],
    positions: Tensor,
    active: Tensor,
    state: LayerState,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    read: StepRead | None,
    turn: TierTurn | None = None,
    seen: SeenTokens | None = None,
    basis: Basis | None = None,
) -> Tensor:
    """`step` of rotated queries and keys on the device's best path; `gates` of the new token by name, (B, Hw) each."""
    # Whatever is written has to be given by position: torch 2.11 looks for it there.
    window = state.window
    gate_rings = gates_of(window.gates, rule)
    ring = (
        window.keys,
        window.values,
        *gate_rings,
        state.memory.get("state"),
        *_fields(state.tier, rule),
        *_tokens(seen),
    )
    if rule is None or read is None:
        score = next(iter(gates.values())).logits if gates else None
        return operator(
            query, key, value, score, None, positions, active, *ring, sinks, scaling, False, 0.0, 0.0, 0.0, False,
            None, None, None, None, None, _basis(basis), **_angles(turn),
            seen_angles=None if seen is None else seen.angles, seen_room=0 if seen is None else seen.room,
            seen_places=None if seen is None else seen.places,
        )  # fmt: skip
    write, decay = gates[rule.write], None if rule.decay is None else gates[rule.decay]
    fading = (None, "none", None, None) if decay is None else _parts(decay)
    return operator(
        query, key, value, write.logits, fading[0], positions, active, *ring, sinks, scaling, rule.delta, rule.l2_eps,
        rule.scale, rule.norm_eps, rule.across_heads, read.query, read.gamma, read.weight, read.norm, read.o_proj,
        _basis(basis), *_parts(write)[1:], *fading[1:], **_maps(read.routes), **_angles(turn),
    )  # fmt: skip


def _fields(tier: TierState | None, rule: StepRule | None) -> tuple[Tensor | None, ...]:
    """A tier as `operator` takes it."""
    if tier is None:
        return (None,) * len(_TIER)
    keys, values = tier.keys, tier.values
    return (
        keys.codes, keys.scales, keys.offset, values.codes, values.scales, values.offset, *gates_of(tier.gates, rule),
    )  # fmt: skip


def _tokens(seen: SeenTokens | None) -> tuple[Tensor | None, ...]:
    """What a step changes of kept tokens, as `operator` takes it."""
    if seen is None:
        return (None,) * len(_SEEN)
    return seen.keys, seen.values, seen.block_keys, seen.block_values, seen.scores, seen.positions


def _maps(routes: Routes | None) -> dict[str, Tensor]:
    """Routes as `operator` takes them; `vars` would break torch.compile's graph."""
    if routes is None:
        return {}
    return {
        "query_map": routes.query_map,
        "key_map": routes.key_map,
        "query_route": routes.query_route,
        "key_route": routes.key_route,
    }


def _angles(turn: TierTurn | None) -> dict[str, Any]:
    """A turn as `operator` takes it."""
    if turn is None:
        return {}
    return {
        "token_angles": turn.token,
        "within_angles": turn.within,
        "near_angles": turn.near,
        "first_angles": turn.first,
        "near": turn.count,
    }


def _basis(basis: Basis | None) -> list[Tensor]:
    """A basis as `operator` takes it."""
    return [] if basis is None else [basis.analysis, basis.deviations, basis.synthesis]


def _parts(gate: Gate) -> tuple[Tensor, str, Tensor | None, Tensor | None]:
    return gate.logits, gate.activation, gate.shift, gate.log_rate

"""Several tokens of one conversation at once over fixed slots: they wait beside the window, and are written later.

Reading changes neither window nor memory: a token that turns out wrong is simply not counted. What waits is read by
the memory again each time, since it does not keep what that writes, until `settle` puts it into the slots for good.
The plain torch form is here, `ahn.ops.step.several_kernel` is the same for a GPU.

Shapes: Hq query heads, Hkv key/value heads, Hw heads that write (Hkv with routes, else Hq), P head dim, S sinks,
W window, T = S + W, N new tokens, G ≤ W places beside the window, of which the first `held` are taken before.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn.layout.slots import Slots
from ahn.layout.state import LayerState, WindowState
from ahn.ops.gate import Gate
from ahn.ops.quantize import precise
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRead, StepRule
from ahn.ops.step.reference import StepRotation, gates_of, named_gates, read_out, rotated, write_and_read_token


def read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: dict[str, Gate],
    start: Tensor,
    held: Tensor,
    state: LayerState,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    finish: StepRead | None,
    rotation: StepRotation | None = None,
) -> Tensor:
    """Put new tokens beside the window, attend, and read what the memory would be.

    Args:
        query: (1, Hq, N, P); key, value: (1, Hkv, N, P).
        gates: of the new tokens by name, (1, Hw, N); none without a memory.
        start, held: (1,) int64, tokens in the slots and beside them; held + N ≤ G.
        state: of the layer, its window in slots, with places beside it.
        sinks: S.
        scaling: of attention scores.
        rule: None without a memory.
        finish: its query (1, Hq, N, P), gamma (1, Hq, N) and weight (1, Hq, N) are of the new tokens.
        rotation: of all queries and keys, with angles of each token; None where they come rotated.

    Returns:
        (1, N, Hq, P): attention over sinks and window of each token, plus the memory's read.
    """
    if rotation is not None:
        query = _turned(query, rotation, rotation.query_norm, rotation.query_eps)
        key = _turned(key, rotation, rotation.key_norm, rotation.key_eps)
        if finish is not None:
            own = _turned(finish.query, rotation, rotation.query_norm, rotation.query_eps)
            finish = dataclasses.replace(finish, query=own)
    window, beside = state.window, _beside(state)
    N, T, G = query.shape[2], window.keys.shape[2], beside.keys.shape[2]
    place = held + torch.arange(N, device=held.device)
    beside.keys.index_copy_(2, place, key.to(beside.keys.dtype))
    beside.values.index_copy_(2, place, value.to(beside.values.dtype))
    for name, gate in gates.items():
        beside.gates[name].index_copy_(2, place, gate.value().to(beside.gates[name].dtype))
    slots, later = torch.arange(T, device=held.device), place[:, None]
    # The token in a slot is replaced by the new one that comes so many after `start`.
    replaced = (slots - start) % (T - sinks)
    in_slots = (slots < start) & ((slots < sinks) | (replaced > later))
    visible = torch.cat([in_slots, torch.arange(G, device=held.device) <= later], dim=1)
    some = visible.any(0)[:, None]
    keys, values = (
        torch.where(some, torch.cat(pair, dim=2), 0)
        for pair in ((window.keys, beside.keys), (window.values, beside.values))
    )
    out = F.scaled_dot_product_attention(query, keys, values, visible, scale=scaling, enable_gqa=True)
    if rule is None or finish is None:
        return out.transpose(1, 2).contiguous()
    first, reads = int(held), list[Tensor]()
    memory = state.memory["state"].clone()
    gone_key, gone_value, write, decay = _leaving(state, start, sinks, rule)
    for i in range(first + N):
        own = finish.query[:, :, max(0, i - first)]
        fade = None if decay is None else decay[:, :, i]
        token = own, gone_key[:, :, i], gone_value[:, :, i], write[:, :, i], fade
        o = write_and_read_token(*token, memory, rule, finish.routes)
        if i >= first:
            weight = None if finish.weight is None else finish.weight[:, :, i - first]
            gamma = finish.gamma[:, :, i - first]
            reads.append(read_out(o, rule, StepRead(own, gamma, weight, finish.norm, finish.o_proj)))
    return (out.to(precise(query.dtype)) + torch.stack(reads, dim=2)).to(query.dtype).transpose(1, 2).contiguous()


def settle(
    start: Tensor, held: Tensor, state: LayerState, sinks: int, rule: StepRule | None, routes: Routes | None
) -> None:
    """Put the tokens beside the window into the slots, and write those that they replace into the memory, in place."""
    if held.is_cuda:
        from ahn.ops.step import several_kernel

        with torch.cuda.device(held.device):
            several_kernel.settle(start, held, state, sinks, rule, routes)
        return
    window, beside = state.window, _beside(state)
    count = int(held)
    if rule is not None:
        gone_key, gone_value, write, decay = _leaving(state, start, sinks, rule)
        nobody = gone_key.new_zeros(1, write.shape[1] if routes is None else len(routes.query_map), gone_key.shape[3])
        for i in range(count):
            fade = None if decay is None else decay[:, :, i]
            token = nobody, gone_key[:, :, i], gone_value[:, :, i], write[:, :, i], fade
            write_and_read_token(*token, state.memory["state"], rule, routes)
    slot = Slots(window.keys.shape[2] - sinks, sinks).of(start + torch.arange(count, device=start.device))
    pairs = (window.keys, beside.keys), (window.values, beside.values)
    for ring, new in (*pairs, *((window.gates[name], beside.gates[name]) for name in window.gates)):
        ring.index_copy_(2, slot, new[:, :, :count])


def _turned(x: Tensor, rotation: StepRotation, norm: Tensor | None, eps: float) -> Tensor:
    """Queries or keys (1, H, N, P) through their norm and RoPE."""
    return rotated(x[0].transpose(0, 1), rotation.cos, rotation.sin, norm, eps).transpose(0, 1)[None]


def _beside(state: LayerState) -> WindowState:
    assert state.beside is not None
    return state.beside


def _leaving(
    state: LayerState, start: Tensor, sinks: int, rule: StepRule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the tokens beside the window replace, float32: keys, values, and gates that are closed where nothing was."""
    window, T = state.window, state.window.keys.shape[2]
    positions = start + torch.arange(_beside(state).keys.shape[2], device=start.device)
    slot, leaves = Slots(T - sinks, sinks).of(positions), positions >= T
    key, value = (
        torch.where(leaves[:, None], x.index_select(2, slot), 0).float() for x in (window.keys, window.values)
    )
    write, decay = (
        None if gate is None else torch.where(leaves, gate.index_select(2, slot), 0).float()
        for gate in gates_of(window.gates, rule)
    )
    assert write is not None
    return key, value, write, decay


@torch.library.custom_op("ahn::several", mutates_args=("beside_keys", "beside_values", "beside_write", "beside_decay"))
def operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor | None,
    decay: Tensor | None,
    start: Tensor,
    held: Tensor,
    beside_keys: Tensor,
    beside_values: Tensor,
    beside_write: Tensor | None,
    beside_decay: Tensor | None,
    keys: Tensor,
    values: Tensor,
    write_ring: Tensor | None,
    decay_ring: Tensor | None,
    state: Tensor | None,
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
    query_map: Tensor | None,
    key_map: Tensor | None,
    query_route: Tensor | None,
    key_route: Tensor | None,
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
) -> Tensor:
    """`read` with every field an argument of its own, as an operator wants it.

    See `layer_read` for all but those of `StepRotation`, which `ahn.decode.fusion` gives.
    """
    rule = finish = rotation = None
    if memory_query is not None and gamma is not None and norm is not None and o_proj is not None:
        rule = StepRule("write", None if decay is None else "decay", delta, l2_eps, scale, norm_eps, across_heads)
        routes = None
        if query_map is not None and key_map is not None and query_route is not None and key_route is not None:
            routes = Routes(query_map, key_map, query_route, key_route)
        finish = StepRead(memory_query, gamma, weight, norm, o_proj, routes)
    layer = LayerState(WindowState(keys, values, named_gates(write_ring, decay_ring)))
    layer.beside = WindowState(beside_keys, beside_values, named_gates(beside_write, beside_decay))
    if state is not None:
        layer.memory["state"] = state
    if cos is not None and sin is not None:
        rotation = StepRotation(cos, sin, query_norm, key_norm, query_eps, key_eps)
    gates = dict[str, Gate]()
    if write is not None:
        gates["write"] = Gate(write, write_activation, write_shift, write_log_rate)
    if decay is not None:
        gates["decay"] = Gate(decay, decay_activation, decay_shift, decay_log_rate)
    arguments = query, key, value, gates, start, held, layer, sinks, scaling, rule, finish, rotation
    if query.is_cuda:
        from ahn.ops.step import several_kernel

        with torch.cuda.device(query.device):
            return several_kernel.read(*arguments)
    return read(*arguments)


@operator.register_fake
def _(query: Tensor, *rest: object, **named: object) -> Tensor:
    B, H, N, P = query.shape
    return query.new_empty(B, N, H, P)


def layer_read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: dict[str, Gate],
    start: Tensor,
    held: Tensor,
    state: LayerState,
    sinks: int,
    scaling: float,
    rule: StepRule | None,
    finish: StepRead | None,
) -> Tensor:
    """`read` of rotated queries and keys on the device's best path, as an operator that torch.compile leaves whole."""
    window, beside = state.window, _beside(state)
    write = decay = None
    if rule is not None:
        write, decay = gates[rule.write], None if rule.decay is None else gates[rule.decay]
    logits = (None if gate is None else gate.logits for gate in (write, decay))
    tokens = query, key, value, *logits, start, held
    places = beside.keys, beside.values, *gates_of(beside.gates, rule)
    rings = *places, window.keys, window.values, *gates_of(window.gates, rule), state.memory.get("state")
    if rule is None or finish is None:
        none = (None,) * 9
        return operator(*tokens, *rings, sinks, scaling, False, 0.0, 0.0, 0.0, False, *none)
    routes = finish.routes
    maps = (None,) * 4 if routes is None else (routes.query_map, routes.key_map, routes.query_route, routes.key_route)
    how = rule.delta, rule.l2_eps, rule.scale, rule.norm_eps, rule.across_heads
    reads = finish.query, finish.gamma, finish.weight, finish.norm, finish.o_proj
    return operator(*tokens, *rings, sinks, scaling, *how, *reads, *maps, *_parts(write), *_parts(decay))


def _parts(gate: Gate | None) -> tuple[str, Tensor | None, Tensor | None]:
    """A gate besides its logits, as `operator` takes it."""
    return ("none", None, None) if gate is None else (gate.activation, gate.shift, gate.log_rate)

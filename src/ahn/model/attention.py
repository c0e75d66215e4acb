"""The attention function "ahn": exact attention over sinks ∪ window, plus the read of the memory.

Registered with transformers' `AttentionInterface`, it is called after RoPE and after the cache's update, before the
base model's `o_proj`. Exact attention runs on the base model's own kernel where that is right, see `ahn.model.route`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ahn.cache import tier
from ahn.decode.layer import StepForward, step_attention
from ahn.errors import AHNError
from ahn.layout.evicted import Evicted, without_padding
from ahn.layout.state import Tensors, TierState
from ahn.layout.visibility import Visibility
from ahn.memory import RecurrentMemory
from ahn.memory.query import memory_query
from ahn.model.context import BaseForward, ForwardContext, LayerContext
from ahn.model.observer import Passage
from ahn.model.route import AttentionCall, LazyMask, kernel_function
from ahn.ops import scan
from ahn.ops.rule import StepRead

NAME = "ahn"


def register() -> None:
    """Make "ahn" known to transformers; on import, for a pickled model looks for it before anything else is run."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, LazyMask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask,
    ahn_forward: ForwardContext | BaseForward | StepForward | None = None,
    ahn_layer: LayerContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, `transformers` attention-function convention.

    Args:
        query: (B, Hq, n, P) of the new tokens.
        key, value: (B, Hkv, T, P) of every token that the cache still holds, new ones last.
        attention_mask: a `LazyMask`.

    Returns:
        (B, n, Hq, P) and the attention weights where the base kernel gives them.
    """
    call = AttentionCall(module, query, key, value, kwargs)
    if ahn_forward is None:
        raise AHNError("A decoder layer was called outside its model; an AHN needs the whole model's forward.")
    if isinstance(ahn_forward, StepForward):
        assert ahn_layer is not None
        return step_attention(module, query, key, value, ahn_forward, ahn_layer, call.scaling)
    if isinstance(ahn_forward, BaseForward) or ahn_layer is None:  # this layer keeps the base model's attention
        return _as_base(call, ahn_forward.kernel, attention_mask)
    forward = ahn_forward.on(query.device)
    for observer in forward.observers:
        observer.attending(ahn_layer, call)
    view, memory = forward.visibility, ahn_layer.ahn.fn
    route, tier_view = forward.route(query, attention_mask, ahn_layer, kwargs), forward.tier(ahn_layer.rotates)
    passed = None
    evicted, tier_state, state = _evict(ahn_layer, view, key, value)
    if tier_view is not None and view.evicted:
        passed = tier.push(
            tier_view,
            tier_state,
            evicted,
            key,
            value,
            forward.config.tier_bits,
            in_order=route.tier_in_order,
            raw=route.tier_raw,
        )
        evicted, tier_state = without_padding(passed.evicted, memory.closed_gates, view.delayed), passed.state
    state = state or memory.init_state(query.shape[0], query.device)
    # Some models turn no keys in some of their layers.
    moves = memory.moves_keys and ahn_layer.rotates
    made = memory.extra_keys(evicted, view.delayed, state, forward.anchored if moves else None)
    if made is not None:
        state = made.state
    out, weights = route.attend(call, passed, made)
    if view.delayed.evicted and isinstance(memory, RecurrentMemory):
        out, state = _remember(call, memory, forward, ahn_layer, evicted, state, out)
    if ahn_layer.cache_layer is not None:
        ahn_layer.cache_layer.keep(tier_state, state)
        if ahn_layer.cache is not None:
            ahn_layer.cache.finish(ahn_layer.cache_layer)
    return out.contiguous(), weights  # as transformers' own functions: some models take a view of it


def _as_base(call: AttentionCall, kernel: str, mask: Any) -> tuple[Tensor, Tensor | None]:
    """What the base model's own kernel makes of a layer with the mask that it would have been given."""
    own = mask.resolve(kernel, call.query.device) if isinstance(mask, LazyMask) else mask
    run = kernel_function(kernel, call.module)
    return run(call.module, call.query, call.key, call.value, own, **call.kwargs)


def _evict(
    layer: LayerContext, view: Visibility, key: Tensor, value: Tensor
) -> tuple[Evicted, TierState | None, Tensors]:
    """The tokens that leave the window, and the layer's tier and memory before this forward."""
    gates = layer.ahn.fn.write_gates(layer.x)
    if layer.cache_layer is None:
        evicted_gates = {name: view.evicted_slots(gate) for name, gate in gates.items()}
        evicted = Evicted(view.evicted_slots(key), view.evicted_slots(value), evicted_gates)
        return without_padding(evicted, layer.ahn.fn.closed_gates, view), None, {}
    evicted = Evicted(*layer.cache_layer.evict(key, value, gates))
    state = layer.cache_layer.state
    assert state is not None
    return without_padding(evicted, layer.ahn.fn.closed_gates, view), state.tier, state.memory


def _remember(
    call: AttentionCall,
    memory: RecurrentMemory,
    forward: ForwardContext,
    layer: LayerContext,
    evicted: Evicted,
    state: Tensors,
    out: Tensor,
) -> tuple[Tensor, Tensors]:
    """Write what leaves, read, and add what was read to the exact attention `out` (B, n, Hq, P); the new state."""
    view = forward.visibility.delayed
    for observer in forward.observers:
        evicted = observer.writing(layer, evicted)
    tail, before = view.length - view.evicted, state
    read, state = _write_and_read(call.module, memory, layer, view, call.query, evicted, state)
    for observer in forward.observers:
        read = observer.reading(Passage(call.module, layer, view, evicted, before, out[:, tail:], read))
    added = out[:, tail:] + read.transpose(1, 2).to(out.dtype)
    return (torch.cat([out[:, :tail], added], dim=1) if tail else added), state


def _write_and_read(
    module: nn.Module,
    memory: RecurrentMemory,
    layer: LayerContext,
    view: Visibility,
    query: Tensor,
    evicted: Evicted,
    state: Tensors,
) -> tuple[Tensor, Tensors]:
    """Write m evicted tokens, read with the last m queries: (B, Hq, m, P) and the new state."""
    x = layer.x[:, -view.evicted :]
    query = query[:, :, -view.evicted :]
    if memory.q_proj is not None:
        query = memory_query(module, memory, layer.x, layer.rope, view.evicted)
    weight = None if layer.router is None else layer.router(view.written / view.window)
    rule = memory.step_rule()
    if rule is not None and scan.has_kernel(query):
        parts = memory.step_norm, memory.o_proj.weight, memory.routes
        finish = StepRead(query, memory.read_gate(x).float(), weight, *parts)
        decay = None if rule.decay is None else evicted.gates[rule.decay]
        read, new = scan.write_and_read(
            query, evicted.key, evicted.value, evicted.gates[rule.write], decay, state["state"], rule, finish
        )
        return read, {"state": new}
    groups = memory.write_heads // evicted.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (evicted.key, evicted.value))
    o, state = memory.scan(query, key, value, evicted.gates, state)
    read = memory.read_out(o, x)
    return read if weight is None else weight.unsqueeze(-1) * read, state


register()

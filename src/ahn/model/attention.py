"""The attention function "ahn": exact attention over sinks ∪ window, plus the read of the memory.

Registered with transformers' `AttentionInterface`, it is called after RoPE and after the cache's update, before the
base model's `o_proj`. Exact attention runs on the base model's own kernel where that is right, see `ahn.model.route`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ahn import private
from ahn.cache import tier
from ahn.cache.layer import AHNLayer
from ahn.cache.layer_context import LayerContext
from ahn.cache.tier import Passed
from ahn.cache.waiting import LayerPart
from ahn.decode.layer import SeveralForward, StepForward, several_attention, step_attention
from ahn.errors import AHNError
from ahn.layout.evicted import Evicted, without_padding
from ahn.layout.state import Tensors, TierState
from ahn.layout.visibility import Visibility
from ahn.memory import RecurrentMemory
from ahn.memory.base import MemoryKeys
from ahn.memory.query import memory_query
from ahn.model.context import BaseForward, ForwardContext
from ahn.model.masks import LazyMask
from ahn.model.observer import Passage
from ahn.model.route import Attended, AttentionCall, Route, SpanRoute, kernel_function, together
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
    ahn_forward: ForwardContext | BaseForward | StepForward | SeveralForward | None = None,
    ahn_layer: LayerContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, `transformers` attention-function convention.

    Args:
        query: (B, Hq, n, P) of the new tokens.
        key, value: (B, Hkv, T, P) of every token that the cache still holds, new ones last.

    Returns:
        (B, n, Hq, P) and the attention weights where the base kernel gives them.
    """
    call = AttentionCall(module, query, key, value, kwargs)
    if ahn_forward is None:
        if not any(hasattr(hook, "layer_idx") for hook in private.pre_hooks(module)):
            raise AHNError(
                "This model was made from the configuration of one with an AHN and has no memory itself: attach or "
                "load one (ahn.attach, ahn.load_adapter), copy the other model (copy.deepcopy), or choose another "
                "attention (model.set_attn_implementation('sdpa'))."
            )
        raise AHNError("A decoder layer was called outside its model; an AHN needs the whole model's forward.")
    if isinstance(ahn_forward, StepForward):
        assert ahn_layer is not None
        return step_attention(module, query, key, value, ahn_forward, ahn_layer, call.scaling)
    if isinstance(ahn_forward, SeveralForward):
        assert ahn_layer is not None
        return several_attention(module, query, key, value, ahn_forward, ahn_layer, call.scaling)
    if isinstance(ahn_forward, BaseForward) or ahn_layer is None:  # this layer keeps the base model's attention
        documents = ahn_forward.documents if isinstance(ahn_forward, BaseForward) else None
        mask = attention_mask if documents is None else attention_mask.apart(documents)
        return _as_base(call, ahn_forward.kernel, mask)
    forward = ahn_forward.on(query.device)
    for observer in forward.observers:
        observer.attending(ahn_layer, call)
    if forward.parts:
        out, weights = _in_parts(call, forward, ahn_layer)
    else:
        out, weights = _attend(call, forward, attention_mask, ahn_layer)
    if ahn_layer.cache is not None and isinstance(ahn_layer.cache_layer, AHNLayer):
        ahn_layer.cache.finish(ahn_layer.cache_layer)
    return out.contiguous(), weights  # as transformers' own functions: some models take a view of it


def _attend(call: AttentionCall, forward: ForwardContext, mask: LazyMask | None, layer: LayerContext) -> Attended:
    """Exact attention with what the memory reads, (B, n, Hq, P), and the state of the layer moved on."""
    route = forward.route(call.query, mask, layer, call.kwargs)
    if isinstance(route, SpanRoute) and torch.is_grad_enabled() and isinstance(layer.ahn.fn, RecurrentMemory):
        call = route.with_memory(call)
    left = _evict(call, forward, layer, route)
    out, weights = route.attend(call, left.passed, left.made)
    if forward.visibility.delayed.evicted and isinstance(layer.ahn.fn, RecurrentMemory):
        out, left.state = _write_and_read(call, forward, layer, left, out)
    if layer.cache_layer is not None:
        layer.cache_layer.keep(left.tier, left.state)
    return out, weights


def _in_parts(call: AttentionCall, forward: ForwardContext, layer: LayerContext) -> Attended:
    """The same where tokens wait beside the window: the parts of the forward one after the other."""
    cache_layer, taken, results = layer.cache_layer, 0, []
    assert isinstance(cache_layer, AHNLayer)
    cache_layer.take(call.key, call.value, layer.ahn.fn.write_gates(layer.x))
    for part, own in forward.in_parts:
        held, new = LayerPart(cache_layer, part), slice(taken, taken + part.queries)
        query = _after_zeros(call.query[:, :, new], own.visibility.length, dim=2)
        part_call = AttentionCall(call.module, query, *held.tokens(), call.kwargs)
        out, weights = _attend(part_call, own, None, _of_part(layer, held, new, own.visibility.length))
        if part.queries:
            results.append((out[:, -part.queries :], None if weights is None else weights[:, :, -part.queries :]))
        taken += part.queries
    return together(results)


def _of_part(layer: LayerContext, held: LayerPart, new: slice, length: int) -> LayerContext:
    """What a layer has of a part with so many tokens, of which these of the forward's are new."""
    x, *rope = (_after_zeros(x[:, new], length, dim=1) for x in (layer.x, *(layer.rope or ())))
    rotated = (rope[0], rope[1]) if rope else None
    return dataclasses.replace(layer, x=x, rope=rotated, gates={}, cache=None, cache_layer=held)


def _after_zeros(x: Tensor, length: int, dim: int) -> Tensor:
    """x with zeros before it, so that there are `length` tokens: what was read before has no query."""
    missing = list(x.shape)
    missing[dim] = length - x.shape[dim]
    return x if not missing[dim] else torch.cat([x.new_zeros(missing), x], dim=dim)


@dataclasses.dataclass
class _Left:
    """What has left exact attention in this forward, and what the layer keeps besides its window.

    Attributes:
        evicted: the tokens that the memory is to write; gates of padding are closed.
        state: of the memory.
        passed: what is seen of the tier, if there is one.
        made: keys that the memory makes of the tokens that have left.
    """

    evicted: Evicted
    tier: TierState | None
    state: Tensors
    passed: Passed | None
    made: MemoryKeys | None


def _as_base(call: AttentionCall, kernel: str, mask: Any) -> tuple[Tensor, Tensor | None]:
    """What the base model's own kernel makes of a layer with the mask that it would have been given."""
    own = mask.resolve(kernel, call.query.device) if isinstance(mask, LazyMask) else mask
    run = kernel_function(kernel, call.module)
    return run(call.module, call.query, call.key, call.value, own, **call.kwargs)


def _evict(call: AttentionCall, forward: ForwardContext, layer: LayerContext, route: Route) -> _Left:
    """Take from the window what leaves it, through the tier, and let the memory make its keys of it."""
    view, memory, tier_view = forward.visibility, layer.ahn.fn, forward.tier(layer.rotates)
    evicted, tier_state, state = _from_window(call, layer, view)
    passed = None
    if tier_view is not None and view.evicted:
        bits, ways = forward.config.tier_bits, (route.tier_in_order, route.tier_raw)
        held = memory.key_basis if forward.config.calibrated_keys else None
        basis = None if held is None else held.basis(call.key.dtype)
        passed = tier.push(tier_view, tier_state, evicted, call.key, call.value, bits, *ways, basis)
        evicted, tier_state = without_padding(passed.evicted, memory.closed_gates, view.delayed), passed.state
    state = state or memory.init_state(call.query.shape[0], call.query.device)
    # Some models do not rotate the keys of some of their layers.
    moves = memory.moves_keys and layer.rotates
    made = memory.extra_keys(evicted, view.delayed, state, forward.anchored if moves else None)
    return _Left(evicted, tier_state, state if made is None else made.state, passed, made)


def _from_window(
    call: AttentionCall, layer: LayerContext, view: Visibility
) -> tuple[Evicted, TierState | None, Tensors]:
    """The tokens that leave the window, and the layer's tier and memory before this forward."""
    gates = layer.ahn.fn.write_gates(layer.x) if layer.gates is None else layer.gates
    if layer.cache_layer is None:
        evicted_gates = {name: view.evicted_slots(gate) for name, gate in gates.items()}
        key, value = call.of_memory[1:] if call.of_memory else map(view.evicted_slots, (call.key, call.value))
        evicted = Evicted(key, value, evicted_gates)
        return without_padding(evicted, layer.ahn.fn.closed_gates, view), None, {}
    evicted = Evicted(*layer.cache_layer.evict(call.key, call.value, gates))
    state = layer.cache_layer.state
    assert state is not None
    return without_padding(evicted, layer.ahn.fn.closed_gates, view), state.tier, state.memory


def _write_and_read(
    call: AttentionCall, forward: ForwardContext, layer: LayerContext, left: _Left, out: Tensor
) -> tuple[Tensor, Tensors]:
    """Write the m tokens that leave and read with the last m queries, before the eyes of observers.

    Args:
        out: (B, n, Hq, P) exact attention.

    Returns:
        `out` with what was read, and the memory's new state.
    """
    view, evicted = forward.visibility.delayed, left.evicted
    if not forward.observers:
        return _through_memory(call, layer, view, evicted, left.state, out)
    for observer in forward.observers:
        evicted = observer.writing(layer, evicted)
    read, state = _through_memory(call, layer, view, evicted, left.state)
    for observer in forward.observers:
        exact = out[:, view.length - view.evicted :]
        read = observer.reading(Passage(call.module, layer, view, evicted, left.state, exact, read))
    return scan.with_read(out, read), state


def _through_memory(
    call: AttentionCall,
    layer: LayerContext,
    view: Visibility,
    evicted: Evicted,
    state: Tensors,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """Write m evicted tokens, read with the last m queries.

    Returns:
        `exact` (B, n, Hq, P) with the reads added, or without it the reads (B, Hq, m, P); and the new state.
    """
    memory = layer.ahn.fn
    assert isinstance(memory, RecurrentMemory)
    if memory.q_proj is not None:
        query = memory_query(call.module, memory, layer.x, layer.rope, view.evicted)
    else:
        query = call.of_memory[0] if call.of_memory else call.query[:, :, -view.evicted :]
    weight = None if layer.router is None else layer.router(view.written / view.window)
    rule = memory.step_rule()
    if rule is not None and scan.has_kernel(query):
        parts = memory.step_norm, memory.o_proj.weight, memory.routes
        gamma = memory.read_gate(layer.x)[:, :, -view.evicted :].float()  # a part of x would be copied, both ways
        finish = StepRead(query, gamma, weight, *parts)
        decay = None if rule.decay is None else evicted.gates[rule.decay]
        out, new = scan.write_and_read(
            query, evicted.key, evicted.value, evicted.gates[rule.write], decay, state["state"], rule, finish, exact
        )
        return out, {"state": new}
    groups = memory.write_heads // evicted.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (evicted.key, evicted.value))
    o, state = memory.scan(query, key, value, evicted.gates, state)
    read = memory.read_out(o, layer.x[:, -view.evicted :])
    read = read if weight is None else weight.unsqueeze(-1) * read
    if view.padded:  # a memory that starts with something has nothing to say in a row of which nothing was written
        read = read.masked_fill((view.written < 1)[:, None, :, None], 0)
    return scan.with_read(exact, read), state


register()

"""The attention function "ahn": exact attention over sinks ∪ window, plus the read of the memory.

Registered with transformers' `AttentionInterface`, it is called after RoPE and after the cache's update, before the
base model's `o_proj`. Exact attention runs on the base model's own kernel.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ahn.attend import spans, windowed
from ahn.cache import tier as low_bit
from ahn.decode.layer import StepForward, step_attention
from ahn.errors import AHNError
from ahn.layout.evicted import Evicted, without_padding
from ahn.layout.state import TierState
from ahn.layout.tier import TierView
from ahn.layout.visibility import Visibility
from ahn.memory import RecurrentMemory
from ahn.memory.query import memory_query
from ahn.model.context import LayerContext
from ahn.model.observer import Observer, Passage
from ahn.ops import scan
from ahn.ops.rule import StepRead

NAME = "ahn"
_DENSE_MASK_KERNELS = ("sdpa", "eager")


@dataclasses.dataclass
class ForwardContext:
    """What the hook on the decoder tells every layer of one forward."""

    visibility: Visibility
    kernel: str
    """The base model's own attention implementation, for example "sdpa"."""
    observers: tuple[Observer, ...] = ()

    def on(self, device: torch.device) -> ForwardContext:
        """The same for layers on another device, made once for all of them."""
        if device == self.visibility.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = dataclasses.replace(self, visibility=self.visibility.on(device))
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, ForwardContext]:
        return {}

    @cached_property
    def tier(self) -> TierView | None:
        """Who sees which quantized tokens; None where there are none."""
        return TierView(self.visibility) if self.visibility.quantized else None


class LazyMask:
    """The base model's mask, made only if a layer needs it: at 1 M tokens of context nobody could hold it."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._masks: dict[str, Any] = {}
        self._elsewhere: dict[tuple[str, torch.device], Any] = {}

    def covers(self, view: Visibility) -> bool:
        """The base mask knows all padding: there is none, or the caller gave this forward a 2-D mask."""
        return not view.padded or self._arguments.get("attention_mask") is not None

    def resolve(self, kernel: str, device: torch.device) -> Any:
        """The mask as the base model's own kernel expects it, where the layer is."""
        if kernel not in self._masks:
            self._masks[kernel] = ALL_MASK_ATTENTION_FUNCTIONS[kernel](**self._arguments)
        mask = self._masks[kernel]
        if mask is None or device == self._arguments.get("device", device):
            return mask
        if (kernel, device) not in self._elsewhere:
            self._elsewhere[kernel, device] = mask.to(device)
        return self._elsewhere[kernel, device]


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
    ahn_forward: ForwardContext | StepForward | None = None,
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
    if ahn_forward is None:
        raise AHNError("A decoder layer was called outside its model; an AHN needs the whole model's forward.")
    if isinstance(ahn_forward, StepForward):
        assert ahn_layer is not None
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return step_attention(module, query, key, value, ahn_forward, ahn_layer, scaling)
    ahn_forward = ahn_forward.on(query.device)
    view, kernel = ahn_forward.visibility, ahn_forward.kernel

    if ahn_layer is None:  # a layer that keeps the base model's attention
        own_mask = attention_mask.resolve(kernel, query.device)
        return kernel_function(kernel, module)(module, query, key, value, own_mask, **kwargs)

    cache_layer, memory = ahn_layer.cache_layer, ahn_layer.ahn.fn
    # "eager" is asked for where its weights are wanted.
    plain = kernel != "eager" and not _own_scores(kwargs) and not memory.slot_count(view.delayed.window)
    banded = plain and windowed.applies(view, query)
    spanned = plain and cache_layer is None and _spans_apply(view, query, kwargs)
    if banded or spanned:
        mask, dense = None, None
    elif view.evicted or view.rolled or view.moved or not attention_mask.covers(view):
        mask = view.mask if cache_layer is None else view.held_mask
        dense = _dense_mask_kernel(kernel, kwargs)
    else:  # nothing has left the window: exactly the base model, with its own mask
        mask, dense = attention_mask.resolve(kernel, query.device), None
    gates = memory.write_gates(ahn_layer.x)
    state: dict[str, Tensor] = {}
    tier_state: TierState | None = None
    if cache_layer is None:
        leaving = {name: view.evicted_slots(gate) for name, gate in gates.items()}
        left = Evicted(view.evicted_slots(key), view.evicted_slots(value), leaving)
    else:
        left = Evicted(*cache_layer.evict(key, value, gates))
        assert cache_layer.state is not None
        state, tier_state = cache_layer.state.memory, cache_layer.state.tier
    left = without_padding(left, memory.closed_gates, view)
    writes, tier, beside = view.delayed, ahn_forward.tier, None
    if tier is not None and view.evicted:
        whole = plain and view.length == 1 and mask is None and tier.visible is None and windowed.supported(query)
        passed = low_bit.push(tier, tier_state, left, key, value, in_order=banded, turn=not whole)
        left, tier_state = without_padding(passed.evicted, memory.closed_gates, writes), passed.state
        if whole or banded:
            beside = passed
        else:
            key, value, mask = _with_extra_keys(key, value, mask, passed.key, passed.value, passed.visible)
    state = state or memory.init_state(query.shape[0], query.device)

    slots = memory.extra_keys(left.key, left.value, writes, state)
    if slots is not None:
        slot_keys, slot_values, visible, state = slots
        key, value, mask = _with_extra_keys(key, value, mask, slot_keys, slot_values, visible[:, None])
    if dense is not None:
        kernel, mask = dense, _as_kernel_mask(mask, dense, query.dtype)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if banded:
        coarse = None if beside is None else (beside.key, beside.value)
        out, weights = windowed.attend(query, key, value, view, scaling, coarse).transpose(1, 2), None
    elif beside is not None:
        out, weights = low_bit.attend(query, key, value, beside, scaling).transpose(1, 2), None
    elif spanned:
        out, weights = spans.attend(query, key, value, view.until, scaling).transpose(1, 2), None
    else:
        out, weights = kernel_function(kernel, module)(module, query, key, value, mask, **kwargs)

    if writes.evicted and isinstance(memory, RecurrentMemory):
        for observer in ahn_forward.observers:
            left = observer.writing(ahn_layer, left)
        tail, before = view.length - writes.evicted, state
        read, state = _write_and_read(module, memory, ahn_layer, writes, query, left, state)
        for observer in ahn_forward.observers:
            read = observer.reading(Passage(module, ahn_layer, writes, left, before, out[:, tail:], read))
        added = out[:, tail:] + read.transpose(1, 2).to(out.dtype)
        out = torch.cat([out[:, :tail], added], dim=1) if tail else added
    if cache_layer is not None:
        cache_layer.keep(tier_state, state)
        if ahn_layer.cache is not None:
            ahn_layer.cache.finish(cache_layer)
    return out, weights


def _with_extra_keys(
    key: Tensor, value: Tensor, mask: Tensor | None, more_key: Tensor, more_value: Tensor, visible: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with more before them, and the mask (B or 1, 1, n, T) of all; None where all are seen."""
    known = visible if mask is None else mask
    if known is not None:
        parts = [
            known.new_ones(1, 1, known.shape[2], x.shape[2]) if seen is None else seen
            for x, seen in ((more_key, visible), (key, mask))
        ]
        batch = max(len(part) for part in parts)
        mask = torch.cat([part.expand(batch, -1, -1, -1) for part in parts], dim=-1)
    return torch.cat([more_key, key], dim=2), torch.cat([more_value, value], dim=2), mask


def _spans_apply(view: Visibility, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether kernels that know spans can do this forward without a cache: the student's while it learns."""
    unpadded = view.evicted > 0 and not view.padded and not view.moved and not view.quantized
    return unpadded and not kwargs.get("dropout") and spans.supported(query)


def _write_and_read(
    module: nn.Module,
    memory: RecurrentMemory,
    layer: LayerContext,
    view: Visibility,
    query: Tensor,
    left: Evicted,
    state: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
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
        decay = None if rule.decay is None else left.gates[rule.decay]
        read, new = scan.write_and_read(
            query, left.key, left.value, left.gates[rule.write], decay, state["state"], rule, finish
        )
        return read, {"state": new}
    groups = memory.write_heads // left.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (left.key, left.value))
    o, state = memory.scan(query, key, value, left.gates, state)
    read = memory.read_out(o, x)
    return read if weight is None else weight.unsqueeze(-1) * read, state


def kernel_function(kernel: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; "eager" lives in the module's own modeling file."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager)


def _dense_mask_kernel(kernel: str, kwargs: dict[str, Any]) -> str:
    """A kernel that takes a mask for each query and key and computes what the base model's own one does."""
    if kernel in _DENSE_MASK_KERNELS:
        return kernel
    return "eager" if _own_scores(kwargs) else "sdpa"


def _own_scores(kwargs: dict[str, Any]) -> bool:
    """Learned sinks (GPT-OSS) or a soft cap (Gemma 2), which flash kernels know and others ignore."""
    return kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None


def _as_kernel_mask(mask: Tensor | None, kernel: str, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as "sdpa" takes it, or as "eager" adds it to the scores."""
    if mask is None or kernel == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


register()

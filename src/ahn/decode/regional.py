"""Compile one decoder layer and run all of them with it: seconds instead of the minute that a whole model takes.

Layers differ in numbers that torch.compile would compile again for (their index, the handles of their hooks) and that
a step never uses. Inside `layers_compiled` they are made the same.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

# One result a batch size, model and memory: more than torch's limit of 8 is no sign of a mistake here.
_VARIANTS = 64
# A matrix-vector product as a fused reduction, not as a call of cuBLAS: it reads weights faster, and takes in the
# norms, biases and activations around it.
_OPTIONS = {"coordinate_descent_tuning": True}


@contextlib.contextmanager
def layers_compiled(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the decoder's layers run compiled, with shared code."""
    layers = list(model.get_decoder().layers)
    before = [(layer.self_attn, layer.self_attn.layer_idx, layer.self_attn._forward_pre_hooks) for layer in layers]
    flags = [layer.self_attn._forward_pre_hooks_with_kwargs for layer in layers]
    for layer in layers:
        module = layer.self_attn
        module.layer_idx = 0
        module._forward_pre_hooks = OrderedDict(enumerate(module._forward_pre_hooks.values()))
        module._forward_pre_hooks_with_kwargs = OrderedDict.fromkeys(module._forward_pre_hooks, True)
        layer.compile(dynamic=False, options=_OPTIONS)
    try:
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            yield
    finally:
        for layer, (module, index, hooks), with_kwargs in zip(layers, before, flags, strict=True):
            layer._compiled_call_impl = None
            module.layer_idx = index
            module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs = hooks, with_kwargs

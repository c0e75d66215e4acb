"""A model's twin: modules of its own over the same tensors.

One layer is compiled for all only if layers differ in nothing but their tensors. So their index, the handles of their
hooks and what somebody compiled are made alike in a twin; the model stays as it is, for whoever uses it meanwhile.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from ahn import private
from ahn.decode.compiled import as_found
from ahn.decode.parts import have_parts, parts
from ahn.layout.state import LayerState
from ahn.ops.basis import Basis
from ahn.ops.step.retained import SeenTokens
from ahn.wrappers import decoder_of

_Twins: TypeAlias = dict[int, nn.Module]
"""By the id of the module that each was made of."""
_FORWARDS = ("forward", private.HOOKED_FORWARD)


def possible(model: PreTrainedModel) -> bool:
    """Whether nobody gave the decoder, a layer or an attention a forward of its own that cannot be had for a twin."""
    decoder = decoder_of(model)
    modules = [decoder, *decoder.layers, *(layer.self_attn for layer in decoder.layers)]
    own = ((module, vars(module)[name]) for module in modules for name in _FORWARDS if name in vars(module))
    return have_parts(model) and all(_rebound(forward, module, module) is not None for module, forward in own)


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A twin as the model is now."""
    with model._ahn.compiled.lock:
        twins: _Twins = {id(module): _twin(module) for module in model.modules()} | parts(model)
    for module in model.modules():
        _join(module, twins)
    twin: PreTrainedModel = twins[id(model)]
    for layer in decoder_of(twin).layers:
        layer.self_attn.layer_idx = 0
    return twin


@contextlib.contextmanager
def states_lent(
    twin: PreTrainedModel,
    states: dict[int, LayerState],
    seen: Mapping[int, SeenTokens],
    bases: Mapping[int, Basis],
) -> Iterator[None]:
    """Inside the block a twin's steps change these states, by layer. It keeps none: the cache owns its tensors."""
    layers = decoder_of(twin).layers
    for index, state in states.items():
        layers[index].ahn.step_state, layers[index].ahn.step_seen = state, seen.get(index)
        layers[index].ahn.step_basis = bases.get(index)
    try:
        yield
    finally:
        for layer in layers:
            layer.ahn.step_state = layer.ahn.step_seen = layer.ahn.step_basis = None


def _twin(module: nn.Module) -> nn.Module:
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(as_found(module))
    private.set_compiled_call(twin, None)
    return twin


def _join(module: nn.Module, twins: _Twins) -> None:
    """Let a module's twin have the twins of what the module has, and forwards of its own."""
    twin = twins[id(module)]
    private.set_children(twin, {name: twins[id(child)] for name, child in private.children(module).items()})
    private.place_hooks(twin, lambda hook: _hook(hook, twins))
    private.drop_output_hooks(twin)  # a step is asked for nothing but logits
    for name in _FORWARDS:
        if name in vars(twin):
            vars(twin)[name] = _rebound(vars(twin)[name], module, twin) or vars(twin)[name]


def _hook(hook: Any, twins: _Twins) -> Any:
    """A hook that holds a module, as `attach` puts it there, for the twin."""
    if not dataclasses.is_dataclass(hook) or isinstance(hook, type):
        return hook
    held = {field.name: id(getattr(hook, field.name)) for field in dataclasses.fields(hook)}
    return dataclasses.replace(hook, **{name: twins[key] for name, key in held.items() if key in twins})


def _rebound(forward: Any, module: nn.Module, twin: nn.Module) -> Any:
    """A forward that was put on a module, for its twin; None if it does not say which module it is for."""
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return MethodType(forward.__func__, twin)
    if isinstance(forward, functools.partial) and forward.args and forward.args[0] is module:
        return functools.partial(forward.func, twin, *forward.args[1:], **forward.keywords)
    return None

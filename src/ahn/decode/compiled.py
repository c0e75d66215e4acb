"""Parts of a model compiled: a decoder layer for steps, a model's small modules for long prompts and training.

For steps one layer is compiled and all run with it: seconds instead of the minute that a whole model takes.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from ahn import private
from ahn.decode.fusion import fuse
from ahn.memory import RecurrentMemory
from ahn.ops import has_triton
from ahn.wrappers import decoder_of

# One result per batch size, model and memory: more than torch's limit of 8 is no sign of a mistake here.
_VARIANTS = 64
_GATES = ("write_gates", "read_gate")
_ROTATION = "apply_rotary_pos_emb"  # as modeling files call it
_OPTIONS = {"coordinate_descent_tuning": True, "combo_kernels": True}  # independent small passes in one kernel


def _lower(module: GraphModule, inputs: Sequence[Any]) -> Any:
    """torch.compile's backend for a layer: its own, after our fusions."""
    fuse(module.graph)
    module.recompile()
    return private.inductor(module, inputs, _OPTIONS)


class CompiledParts:
    """What torch.compile made of a model's small parts, kept by its adapter: making them costs milliseconds each.

    Attributes:
        calls: what runs in place of a module, or of a memory's method (module, name).
        blocks: `leaves_compiled` blocks that are open, in all threads. The first installs, the last one removes.
        lock: held while either is changed.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, Callable[..., Any]] = {}
        self.blocks = 0
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledParts, ()  # a copy of the model has parts of its own


@contextlib.contextmanager
def layers_compiled(twin: PreTrainedModel) -> Iterator[None]:
    """Let the decoder's layers of a twin run compiled, with shared code, and what stands before and after them.

    To be called inside the block, where torch may compile as often as that takes.
    """
    decoder = decoder_of(twin)
    # Uncompiled, the angles of a token and the last norm are 17 kernels of a few numbers each.
    ends = [end for end in (getattr(decoder, "rotary_emb", None), getattr(decoder, "norm", None)) if end is not None]
    for part in (*decoder.layers, *ends):
        part.compile(dynamic=False, backend=_lower)
    with private.compiled_variants(_VARIANTS):
        yield


def as_found(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without those that `leaves_compiled` put there."""
    own = dict(vars(module))
    if own.pop("ahn_rotation", None) is not None:
        del own["forward"]
    if isinstance(module, RecurrentMemory):
        own = {name: x for name, x in own.items() if name not in _GATES}
    return own


def leaves_fused(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """`leaves_compiled` where it can be had and pays: on one GPU with Triton. Elsewhere nothing happens.

    Around training it must hold until the last backward pass: with gradient checkpointing that one runs layers again,
    and must find them as the forward pass left them.
    """
    fits = model.device.type == "cuda" and has_triton() and not on_several_devices(model)
    return leaves_compiled(model) if fits else contextlib.nullcontext()


def on_several_devices(model: PreTrainedModel) -> bool:
    """accelerate moves tensors between this model's layers (`device_map`): neither compiled nor captured."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


@contextlib.contextmanager
def leaves_compiled(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block norms, rotations and plain MLPs run compiled, for any length, with gradients or without.

    So do a memory's gates where no gradients are wanted. Each is then one pass over memory; the rest of a layer is
    matrix products and attention. A block within a block changes nothing.
    """
    parts: CompiledParts = model._ahn.compiled
    with parts.lock:
        if not parts.blocks:
            _install(model, parts.calls)
        parts.blocks += 1
    try:
        with private.compiled_variants(_VARIANTS):
            yield
    finally:
        with parts.lock:
            parts.blocks -= 1
            if not parts.blocks:
                _remove(model)


def _install(model: PreTrainedModel, calls: dict[Any, Callable[..., Any]]) -> None:
    """Put compiled calls into the modules of one model; `calls` keeps them for the next time."""
    for layer in decoder_of(model).layers:
        for module in layer.modules():
            if _is_leaf(module) and private.compiled_call(module) is None:
                if module not in calls:
                    calls[module] = _for_any_length(private.uncompiled_call(module), 1)
                private.set_compiled_call(module, calls[module])
            elif isinstance(module, RecurrentMemory):
                for name in _GATES:
                    if (module, name) not in calls:
                        calls[module, name] = _without_gradients(getattr(module, name))
                    module.__dict__[name] = calls[module, name]
        _rotate_compiled(layer.self_attn, calls)


def _remove(model: PreTrainedModel) -> None:
    """Undo `_install`; what its user compiled stays."""
    calls = model._ahn.compiled.calls
    for layer in decoder_of(model).layers:
        for module in layer.modules():
            if module in calls and private.compiled_call(module) is calls[module]:
                private.set_compiled_call(module, None)
            elif isinstance(module, RecurrentMemory):
                for name in _GATES:
                    module.__dict__.pop(name, None)
        if calls.pop((layer.self_attn, "forward"), None) is not None:
            del layer.self_attn.forward, layer.self_attn.ahn_rotation


def _rotate_compiled(attention: nn.Module, calls: dict[Any, Callable[..., Any]]) -> None:
    """Let one attention module rotate by compiled code.

    Its modeling file finds the rotation among its globals, which belong to everybody. The module gets the same forward
    over a copy of these globals. One that somebody else has wrapped stays as it is.
    """
    function = inspect.unwrap(type(attention).forward)
    if "forward" in attention.__dict__ or _ROTATION not in function.__code__.co_names:
        return
    rotation = _rotation(function.__globals__[_ROTATION])
    attention.__dict__["ahn_rotation"] = rotation  # for a memory's own query as well
    names = {**function.__globals__, _ROTATION: rotation}
    own = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    attention.forward = calls[attention, "forward"] = MethodType(own, attention)


def _for_any_length(function: Callable[..., Any], tokens: int) -> Callable[..., Any]:
    """The function compiled for one model and any number of tokens, which are that dimension of all tensors.

    With every size open (`dynamic=True`) an element's place is worked out by divisions: a rotation of 8192 × 16 heads
    took six times as long as its bytes.
    """
    inner = torch.compile(function, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        for x in args:
            if isinstance(x, Tensor) and x.dim() > 2:
                private.mark_any_size(x, tokens % x.dim())
        return inner(*args, **kwargs)

    return call


def _without_gradients(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of inputs (B, n, D), compiled for when no gradients are wanted: training has its own form of a gate."""
    inner = _for_any_length(method, 1)

    def call(x: Tensor) -> Any:
        return method(x) if torch.is_grad_enabled() else inner(x)

    return call


@cache
def _rotation(rope: Callable[..., Any]) -> Callable[..., Any]:
    """Of queries and keys (B, H, n, P) by cosines and sines (B or 1, n, P)."""
    return _for_any_length(rope, -2)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for tensors of any size, once per process."""
    return torch.compile(function, dynamic=True)


def _is_leaf(module: nn.Module) -> bool:
    """A norm, or projections with an activation between them: nothing whose work depends on its data.

    Nor one that others changed: tensor parallelism puts a forward on what it has divided.
    """
    children = list(module.children())
    if not all(map(private.as_written, (module, *children))):
        return False
    if not children:
        return type(module).__name__.endswith("RMSNorm")
    plain = all(isinstance(child, nn.Linear) or not list(child.parameters()) for child in children)
    return type(module).__name__.endswith("MLP") and plain

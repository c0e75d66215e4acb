"""A model whose layers lie on several devices, as `device_map="auto"` leaves it: the same as on one.

There is one device here. `Placed` tensors compute on it but say that they lie on others, and an operation over two of
those is refused, as on real ones. What moves tensors between the layers are accelerate's own hooks.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import ahn
from ahn import private
from ahn.attend import windowed
from ahn.decode import compiled
from ahn.layout import copies
from ahn.ops import quantize

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
CPU = torch.device("cpu")
_aten = torch.ops.aten
# Indices may come from the CPU.
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class Placed(Tensor):
    """Numbers of the CPU that say they lie on `place`. Below Python they say "meta", which needs no driver."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> Placed:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: Tensor, place: torch.device) -> None:
        self.inner, self.place = inner, place

    @property
    def device(self) -> torch.device:
        return self.place

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any) -> Tensor:
        return Placed(self.inner.new_tensor(data), self.place)

    def __repr__(self) -> str:
        return f"Placed({tuple(self.shape)}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors(args, kwargs)
        places = {x.device for x in tensors if isinstance(x, Placed)}
        cpu = any(not isinstance(x, Placed) and x.dim() > 0 for x in tensors)
        copies = func in (_aten._to_copy.default, _aten.copy_.default)
        if not copies and (len(places) > 1 or (cpu and func not in _INDEXED)):
            raise RuntimeError(f"{func} over tensors on {[str(x.device) for x in tensors]}")
        place = kwargs.get("device")
        place = next(iter(places)) if place is None or place.type == "meta" else place
        if "device" in kwargs:
            kwargs["device"] = CPU
        result = func(*_plain(args), **_plain(kwargs))
        if not func._schema.returns:
            return None
        return args[0] if func._schema.is_mutable else _placed(result, place)


class Factories(TorchDispatchMode):
    """New tensors on a device that there is not. torch takes this for its own fake mode and looks for no driver."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        holds = any(isinstance(x, Placed) for x in _tensors(args, kwargs))
        if holds or place is None or torch.device(place) == CPU:
            return func(*args, **kwargs)
        if torch.device(place).type == "meta":  # a number beside a tensor; of that device it may be
            assert func is _aten.scalar_tensor.default, func
            return func(*args, **kwargs | {"device": CPU})
        return _placed(func(*args, **kwargs | {"device": CPU}), torch.device(place))


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """What an operation takes or gives, its tensors changed: torch's own `tree_map` takes ten times as long."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(change, x) for name, x in value.items()}
    return type(value)(_mapped(change, x) for x in value) if type(value) in (tuple, list) else value


def _tensors(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(found.append, list(values))
    return found


def _plain(value: Any) -> Any:
    return _mapped(lambda x: x.inner if isinstance(x, Placed) else x, value)


def _placed(value: Any, place: torch.device) -> Any:
    if place == CPU:
        return value
    return _mapped(lambda x: x if isinstance(x, Placed) else Placed(x, place), value)


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(copies, "_fits", lambda x: False)  # there is no memory to look at
    sdpa = F.scaled_dot_product_attention

    def one_kernel(*args: Any, **kwargs: Any) -> Tensor:  # torch would make tensors in it without asking Python
        places = {x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        assert len(places) == 1, places
        return _placed(sdpa(*_plain(args), **_plain(kwargs)), places.pop())

    monkeypatch.setattr(F, "scaled_dot_product_attention", one_kernel)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes numbers on the CPU and moves them
    yield
    torch._C._set_only_lift_cpu_tensors(False)
    for kept in (windowed._reversed, quantize._hadamard, quantize._bytes):  # under the names of devices
        kept.cache_clear()


class Hook(AlignDevicesHook):
    """accelerate's, which would ask the device whether it is there."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Half of the layers on each of two devices, the head on the second, with the hooks of `dispatch_model`."""
    layers, decoder = model.model.layers, model.model
    half = len(layers) // 2
    blocks: dict[nn.Module, torch.device] = {layer: FIRST if i < half else SECOND for i, layer in enumerate(layers)}
    blocks |= {decoder.embed_tokens: FIRST, decoder.rotary_emb: FIRST, decoder.norm: SECOND, model.lm_head: SECOND}
    keep = private.CACHE
    add_hook_to_module(model, Hook(FIRST, io_same_device=True, skip_keys=keep))
    for block, place in blocks.items():
        for part in block.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(Placed(parameter.detach(), place), requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = Placed(buffer, place)
            add_hook_to_module(part, Hook(place, skip_keys=keep))
    model.hf_device_map = {"first": FIRST, "second": SECOND}
    return model


def pair(architecture: str, quantized: int, memory: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    config = {"memory": memory, "window": 6, "sinks": 2, "quantized": quantized, "prefill_chunk_size": 4}
    one = models.adapted(architecture, **config)
    return one, spread(copy.deepcopy(one))


def place(x: Tensor) -> Tensor:
    return Placed(x, FIRST)


def compare(one: PreTrainedModel, two: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> None:
    with torch.no_grad():
        expected = logits(one, ids, mask, lambda x: x)
        with Factories():
            found = logits(two, ids, mask, place)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == FIRST  # where the input was: accelerate's outermost hook is still in front
        torch.testing.assert_close(_plain(ours), theirs, rtol=0, atol=1e-5)


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, put: Any) -> list[Tensor]:
    """Of a prompt in chunks, a second one on the live cache, and three steps."""
    cache, found = ahn.AHNCache.for_model(model), []
    for start, stop in ((0, 17), (17, 22), (22, 23), (23, 24), (24, 25)):
        own = None if mask is None else put(mask[:, :stop])
        output = model(put(ids[:, start:stop]), attention_mask=own, past_key_values=cache)
        found.append(output.logits)
    return found


@pytest.mark.sample(2)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("quantized", [0, 4])
@pytest.mark.parametrize("memory", ["gated_deltanet", "mamba2", "window_only", "ct_max"])
def test_logits_are_those_of_one_device(memory: str, quantized: int, padded: bool) -> None:
    one, two = pair("qwen3", quantized, memory)
    ids, mask = models.tokens(2, 25), None
    if padded:
        mask = torch.ones(2, 25, dtype=torch.long)
        mask[1, :3] = 0
    compare(one, two, ids, mask)


def test_layers_without_a_memory_get_their_mask_too() -> None:
    one, two = pair("gemma3", 0, "gated_deltanet")
    ids, mask = models.tokens(2, 25), torch.ones(2, 25, dtype=torch.long)
    mask[1, :3] = 0
    compare(one, two, ids, mask)


@pytest.mark.slow
def test_scores_of_a_layer_reach_those_on_another_device() -> None:
    config = {"slots": 16, "passage": 2, "score_layer": 0, "prefill_chunk_size": 4, "max_distance": 0}
    one = models.adapted("qwen3", memory="retained", window=6, sinks=2, **config)
    compare(one, spread(copy.deepcopy(one)), models.tokens(2, 25), None)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_parked_conversation_goes_on(architecture: str) -> None:
    one, two = pair(architecture, 0, "gated_deltanet")
    ids, caches = models.tokens(2, 24), [ahn.AHNCache.for_model(model) for model in (one, two)]
    with torch.no_grad():
        one(ids[:, :20], past_key_values=caches[0])
        expected = one(ids[:, 20:], past_key_values=caches[0]).logits
        with Factories():
            two(place(ids[:, :20]), past_key_values=caches[1])
            caches[1].to("cpu")
            found = two(place(ids[:, 20:]), past_key_values=caches[1]).logits
    torch.testing.assert_close(_plain(found), expected, rtol=0, atol=1e-5)


def test_small_passes_are_fused_on_one_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_triton", lambda: True)

    def fused(*places: int) -> bool:
        model = types.SimpleNamespace(device=FIRST, hf_device_map=dict(enumerate(places)))
        return not isinstance(compiled.leaves_fused(model), contextlib.nullcontext)  # type: ignore[arg-type]

    assert fused() and fused(0, 0) and not fused(0, 1)


@pytest.mark.parametrize("first", ["attached", "dispatched"])
def test_the_hooks_of_accelerate_stay(first: str) -> None:
    """Whichever came first; and `detach` leaves them as they were."""
    config = ahn.AHNConfig(memory="window_only", window=6, sinks=2, prefill_chunk_size=4)
    one, two = ahn.attach(models.base(), config), models.base()
    two = spread(ahn.attach(two, config)) if first == "attached" else ahn.attach(spread(two), config)
    ids = models.tokens(2, 17)
    with torch.no_grad(), Factories():
        found = two(place(ids)).logits
        torch.testing.assert_close(_plain(found), one(ids).logits, rtol=0, atol=1e-5)
        assert found.device == FIRST
        ahn.detach(two)
        found = two(place(ids)).logits
        torch.testing.assert_close(_plain(found), ahn.detach(one)(ids).logits, rtol=0, atol=1e-5)
    assert found.device == FIRST

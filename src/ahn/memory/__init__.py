"""Recurrent memories. One file is one memory: a new file with a `Memory` subclass is found by itself."""

from __future__ import annotations

import bisect
import importlib
import pkgutil
import reprlib
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ahn.errors import AHNError
from ahn.memory.base import Memory, RecurrentMemory
from ahn.memory.key_basis import KeyBasis
from ahn.shape import DEFAULT_SLOTS, ModelShape

if TYPE_CHECKING:
    from ahn.config import AHNConfig

__all__ = [
    "Memory",
    "RecurrentMemory",
    "baselines",
    "by_published_name",
    "get",
    "make",
    "names",
    "recurrent",
    "slot_count",
    "window_within",
]


@cache
def _registry() -> dict[str, type[Memory]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = Memory.__subclasses__()
    for cls in found:  # grows while it is walked: subclasses of subclasses too
        found += cls.__subclasses__()
    named = [cls for cls in found if "name" in vars(cls)]  # a class without its own name is only a base of others
    _refuse_twins(named)
    return {cls.name: cls for cls in sorted(named, key=lambda cls: cls.name)}


def _refuse_twins(classes: list[type[Memory]]) -> None:
    """A copy or subclass whose names were left as they are would be taken for the other, in files as well."""
    for field in ("name", "published_name"):
        holders: dict[str, str] = {}
        for cls in classes:
            value, here = getattr(cls, field), f"{cls.__module__}.{cls.__qualname__}"
            # The same class twice is a notebook's cell that was run again: the last one counts.
            if value is not None and (other := holders.setdefault(value, here)) != here:
                raise AHNError(f"Two memories have the {field} {value!r}, {other} and {here}: change one.")


def names() -> tuple[str, ...]:
    """Names of the memories that can be trained, as `AHNConfig.memory` takes them."""
    return tuple(name for name, cls in _registry().items() if cls.published_name is not None)


def recurrent() -> tuple[str, ...]:
    """Names of those among them that have a recurrent state, which distillation trains."""
    return tuple(name for name in names() if issubclass(get(name), RecurrentMemory))


def baselines() -> tuple[str, ...]:
    """Names of what memories are compared with; `AHNConfig.memory` takes these too. They have no parameters."""
    return tuple(name for name, cls in _registry().items() if cls.published_name is None)


def get(name: str) -> type[Memory]:
    """The memory class called `name`."""
    try:
        return _registry()[name]
    except (KeyError, TypeError):  # TypeError: a configuration file may say anything
        known = ", ".join(names() + baselines())
        raise AHNError(f"Unknown memory {reprlib.repr(name)}; this installation has {known}.") from None


def make(config: AHNConfig, shape: ModelShape, layer: int = 0) -> Memory:
    """A new memory for a layer of a model of this shape."""
    kind = get(config.memory)
    sizes = shape.hidden_size, shape.heads, shape.head_dim, shape.kv_heads
    made = kind(
        *sizes,
        q_proj=config.q_proj,
        slots=config.slots,
        bits=config.tier_bits,
        passage=config.passage,
        **_of_tokens(config, layer) if kind.keeps_tokens else {},
    )
    if config.calibrated_keys:
        made.key_basis = KeyBasis(shape.kv_heads, shape.head_dim)
    return made


def _of_tokens(config: AHNConfig, layer: int) -> dict[str, Any]:
    """Which heads of a layer keep tokens, and by whose scores."""
    scores = "own" if config.score_layer is None else "made" if layer == config.score_layer else "given"
    return {"slot_heads": config.heads_of(layer), "scores": scores}


def by_published_name(published: str) -> type[Memory]:
    """The memory class that published checkpoints call `published` (for example "GatedDeltaNet")."""
    for cls in _registry().values():
        if cls.published_name == published:
            return cls
    known = ", ".join(cls.published_name for cls in _registry().values() if cls.published_name)
    raise AHNError(f"Unknown AHN implementation {published!r}; this installation has {known}.")


def slot_count(name: str, window: int, slots: int = DEFAULT_SLOTS) -> int:
    """Keys per layer that attention sees besides sinks and window with the memory called `name`.

    Args:
        window: tokens before one reaches the memory: quantized ones count.
        slots: `AHNConfig.slots`.
    """
    with torch.device("meta"):
        return get(name)(hidden_size=1, heads=1, head_dim=1, slots=slots).slot_count(window)


def window_within(name: str, keys: int, quantized: int = 0) -> int:
    """The widest window that fits into `keys` exact keys together with the slots of a memory without parameters.

    What a trained memory holds, tokens too, is its state: methods with one are compared by the bytes of all they hold.

    Args:
        quantized: tokens between window and memory: no exact keys, but the memory may have more slots for them.

    Raises:
        AHNError: there is no room for a window of one token.
    """
    with torch.device("meta"):
        kind = get(name)
        taken = kind(hidden_size=1, heads=1, head_dim=1).slot_count
    if kind.published_name is not None:
        return keys
    window = bisect.bisect_right(range(1, keys + 1), keys, key=lambda window: window + taken(window + quantized))
    if window < 1:
        raise AHNError(f"A window of {keys} tokens has no room for the slots of {name}: choose a larger one.")
    return window

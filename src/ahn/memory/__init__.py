"""Recurrent memories. One file is one memory: a new file with a `Memory` subclass is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ahn.errors import AHNError
from ahn.memory.base import Memory

__all__ = ["Memory", "by_published_name", "get", "names"]


@cache
def _registry() -> dict[str, type[Memory]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = Memory.__subclasses__()
    for cls in found:  # grows while it is walked: subclasses of subclasses too
        found += cls.__subclasses__()
    return {cls.name: cls for cls in sorted(found, key=lambda cls: cls.name)}


def names() -> tuple[str, ...]:
    """Names of all memories, as `AHNConfig.memory` takes them."""
    return tuple(_registry())


def get(name: str) -> type[Memory]:
    """The memory class called `name`."""
    try:
        return _registry()[name]
    except KeyError:
        raise AHNError(f"Unknown memory {name!r}; this installation has {', '.join(names())}.") from None


def by_published_name(published: str) -> type[Memory]:
    """The memory class that published checkpoints call `published` (for example "GatedDeltaNet")."""
    for cls in _registry().values():
        if cls.published_name == published:
            return cls
    known = ", ".join(cls.published_name for cls in _registry().values())
    raise AHNError(f"Unknown AHN implementation {published!r}; this installation has {known}.")

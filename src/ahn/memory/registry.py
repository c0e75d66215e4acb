"""Which memories there are: every module of this folder may have some, and one that is put there is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
import reprlib
from functools import cache
from pathlib import Path

from ahn.errors import AHNError
from ahn.memory.base import Memory, RecurrentMemory


@cache
def _registry() -> dict[str, type[Memory]]:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
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


def by_published_name(published: str) -> type[Memory]:
    """The memory class that published checkpoints call `published` (for example "GatedDeltaNet")."""
    for cls in _registry().values():
        if cls.published_name == published:
            return cls
    known = ", ".join(cls.published_name for cls in _registry().values() if cls.published_name)
    raise AHNError(f"Unknown AHN implementation {published!r}; this installation has {known}.")

"""Models that ahn knows by a short name: `tiny`, which comes with it, and `smollm2`, which it finds or gets."""

import importlib
from pathlib import Path
from typing import Any

from ahn.checkpoint.directory import CONFIG

NAMES = ("tiny", "smollm2")
_MODULES = {"tiny": "ahn.tiny", "ahn-tiny": "ahn.tiny", "smollm2": "ahn.smollm2"}


def known(name: str) -> Any | None:
    """The module with `path()`, `adapters()` and `adapter_path()` of a model known by name, else None.

    As everywhere a directory comes first: one of that name with a config.json is meant itself.
    """
    if name not in _MODULES or (Path(name) / CONFIG).is_file():
        return None
    return importlib.import_module(_MODULES[name])


def resolve(name: str) -> str:
    """The directory of a model known by name, found or got now; any other name as it is.

    Raises:
        AHNError: a known model that cannot be had here.
    """
    module = known(name)
    return name if module is None else str(module.path())


def resolve_adapter(model: str, adapter: str | None, default: str | None = None) -> str | None:
    """The directory of a shipped memory that is named by its kind, for a model known by name; else as it is.

    Args:
        model: what the user called the model.
        adapter: what the user called the adapter; None takes `default`, if that is shipped, or the first that is.
    """
    module = known(model)
    shipped = module.adapters() if module else ()
    if adapter is None and shipped:
        adapter = default if default in shipped else shipped[0]
    return str(module.adapter_path(adapter)) if module and adapter in shipped else adapter


def base_name(name: str) -> str:
    """What an adapter records as its base: what this or another machine finds again.

    The shipped model's directory, SmolLM2's Hub id, any other name as it is.
    """
    module = known(name)
    return name if module is None else getattr(module, "REPOSITORY", str(module.path()))

"""Artificial Hippocampus Networks: long context for open LLMs at constant cost (arXiv 2510.07318)."""

import importlib
from typing import TYPE_CHECKING, Any

from ahn.auto import register_with_transformers
from ahn.costs import cost, count_parameters
from ahn.errors import AHNError

if TYPE_CHECKING:
    from ahn import inspect as inspect
    from ahn import memory as memory
    from ahn import ops as ops
    from ahn import smollm2 as smollm2
    from ahn import tiny as tiny
    from ahn import training as training
    from ahn.cache.conversation import AHNCache
    from ahn.checkpoint import from_pretrained, load_adapter, merge, save_adapter, split
    from ahn.config import AHNConfig
    from ahn.model.adapter import adapter_parameters, attach, detach, set_window
    from ahn.model.attached import disabled

__all__ = [
    "AHNCache",
    "AHNConfig",
    "AHNError",
    "adapter_parameters",
    "attach",
    "cost",
    "count_parameters",
    "detach",
    "disabled",
    "from_pretrained",
    "load_adapter",
    "merge",
    "save_adapter",
    "set_window",
    "split",
]

_HOME = {
    "ahn.model.adapter": ("adapter_parameters", "attach", "detach", "set_window"),
    "ahn.model.attached": ("disabled",),
    "ahn.cache": ("AHNCache",),
    "ahn.checkpoint": ("from_pretrained", "load_adapter", "merge", "save_adapter", "split"),
    "ahn.config": ("AHNConfig",),
}
_MODULES = ("inspect", "memory", "ops", "smollm2", "tiny", "training")


if not TYPE_CHECKING:  # for a type checker every name would exist

    def __getattr__(name: str) -> Any:
        # torch and transformers take seconds to import; `ahn --help` needs neither.
        if name in _MODULES:
            return importlib.import_module(f"ahn.{name}")
        for module, names in _HOME.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module 'ahn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])


register_with_transformers()

"""Artificial Hippocampus Networks: long context for open LLMs at constant cost (arXiv 2510.07318)."""

from ahn.adapter import adapter_parameters, attach, detach, disabled, set_window
from ahn.cache import AHNCache
from ahn.checkpoint import from_pretrained, load_adapter, merge, save_adapter, split
from ahn.config import AHNConfig
from ahn.cost import cost, count_parameters
from ahn.errors import AHNError

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

"""Checkpoints: adapters, merged models and the published formats of both."""

from ahn.checkpoint.adapter import load_adapter, save_adapter
from ahn.checkpoint.loading import from_pretrained
from ahn.checkpoint.merging import merge, split

__all__ = ["from_pretrained", "load_adapter", "merge", "save_adapter", "split"]

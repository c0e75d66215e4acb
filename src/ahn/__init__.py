"""Artificial Hippocampus Networks: long context for open LLMs at constant cost (arXiv 2510.07318)."""

from ahn.config import AHNConfig
from ahn.errors import AHNError

__all__ = ["AHNConfig", "AHNError"]

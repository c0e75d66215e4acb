"""Decoding on a GPU: one token for every row is one replay of a captured CUDA graph over buffers that never move."""

from ahn.decode.ahead import loop
from ahn.decode.runner import MORE_OUTPUTS, asked, forward, runs

__all__ = ["MORE_OUTPUTS", "asked", "forward", "loop", "runs"]

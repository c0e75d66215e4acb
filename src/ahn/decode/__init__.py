"""Decoding on a GPU: one token for every row, or a few of one row, are a replay of a captured CUDA graph.

Its buffers never move.
"""

from ahn.decode.ahead import loop
from ahn.decode.runner import MORE_OUTPUTS, asked, runs
from ahn.decode.several import forward, possible, prepare

__all__ = ["MORE_OUTPUTS", "asked", "forward", "loop", "possible", "prepare", "runs"]

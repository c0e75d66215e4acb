"""Sinks + window without a memory: what leaves the window is forgotten. The baseline of every comparison."""

from ahn.memory.base import Memory


class WindowOnly(Memory):
    """Attention sinks and a sliding window (Xiao et al. 2023, arXiv 2309.17453), nothing else."""

    name = "window_only"
    heads_apart = True
    forgets = True

"""Sinks that move along behind a text that is longer than the base was trained on; see `Visibility.anchor`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ahn import private
from ahn.layout.rotation import Rotation
from ahn.layout.state import LayerState

TOGETHER = 1 << 24
"""Numbers that are turned at once at most: 64 MiB in float32, of which there are a few copies meanwhile."""


@torch.no_grad()
def move(
    states: Iterable[LayerState], before: tuple[int, ...], after: tuple[int, ...], sinks: int, rotation: Rotation
) -> None:
    """Move the keys of sinks, in place, from one anchor to another; they are turned from their own positions each time.

    What goes to the same place is turned together, of all layers and rows: it is little work, and a host would need a
    hundred times as long to begin it for each layer.

    Args:
        states: of layers whose keys are turned by their positions, all that a conversation has or some of them.
        before, after: anchors of each row, or of all rows.
    """
    moves: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for state in states:
        here = state.window.keys[:, :, :sinks]
        new = state.sinks is None
        own = state.sinks = here.clone() if state.sinks is None else state.sinks
        rows = len(here)
        pairs = list(zip(*(x if len(x) == rows else x * rows for x in (before, after)), strict=True))
        alike = len(set(pairs)) == 1
        for row, (old, now) in enumerate(pairs[:1] if alike else pairs):
            if old == now:
                continue
            of = slice(None) if alike else slice(row, row + 1)
            if not old and not new:  # the window knows best: the row may have read more sinks since they were put aside
                own[of].copy_(here[of])
            place = now, here.device, here.dtype, here.shape[1:]  # layers of some bases differ
            moves.setdefault(place, []).append((here[of], own[of]))
    for (now, device, *_), keys_and_sinks in moves.items():
        _turn(keys_and_sinks, now, torch.arange(sinks, device=device)[None], rotation)


def _turn(moves: list[tuple[Tensor, Tensor]], by: int, own: Tensor, rotation: Rotation) -> None:
    """Write sinks, the second of each pair, over their keys, the first, moved along by so many tokens."""
    if not by:
        private.copy_all([keys for keys, _ in moves], [sinks for _, sinks in moves])
        return
    count = max(1, TOGETHER // moves[0][1].numel())
    for start in range(0, len(moves), count):
        keys, sinks = (list(x) for x in zip(*moves[start : start + count], strict=True))
        # One number for all: a tensor made of several would wait for all that a GPU has to do.
        moved = rotation.turn(rotation.undo(torch.cat(sinks), own), own + by)
        private.copy_all(keys, list(moved.split([len(x) for x in sinks])))

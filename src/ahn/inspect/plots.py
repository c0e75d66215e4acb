"""Figures of a trace; save them with `ahn.measure.plots.save`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.inspect.kinds import KindWrites, Mean
from ahn.inspect.trace import Trace
from ahn.measure.plots import AHN, DASHED, INK, MUTED, WIDTH, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 200
"""Columns of a picture over time, at most."""
NAMED = 12
"""Layers whose number stands at an axis, at most."""


def strength_figure(trace: Trace, title: str, row: int = 0) -> Figure:
    """Write strength over time, one line of the picture per head, layers from top to bottom."""
    writes = trace.something()
    real, edges = _time(trace, row)
    rows = torch.cat([_binned(w.strength[row][:, real], len(edges) - 1) for w in writes.values()])
    figure, (axis,) = new_figure(1, title)
    axis.grid(False)
    heads = next(iter(writes.values())).strength.shape[1]
    extent = (edges[0], edges[-1], len(rows), 0)
    picture = axis.imshow(rows.numpy(), aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
    figure.colorbar(picture, ax=axis, label="write strength")
    axis.set_yticks(*_some([heads * (n + 0.5) for n in range(len(writes))], list(writes)))
    for n in range(1, len(writes)):
        axis.axhline(heads * n, color="white", linewidth=0.8)
    axis.set_ylabel("layer (a line per head)")
    axis.set_xlabel("position of the written token")
    return figure


def state_figure(trace: Trace, title: str, row: int = 0) -> Figure:
    """Norm of the state over time, the mean over heads, one line per layer."""
    import matplotlib

    figure, (axis,) = new_figure(1, title)
    writes = trace.something()
    real, edges = _time(trace, row)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    colours = matplotlib.colormaps["viridis"]
    for n, (layer, w) in enumerate(writes.items()):
        norms = _binned(w.state_norm[row][:, real], len(middles)).mean(0).tolist()
        axis.plot(middles, norms, color=colours(n / max(1, len(writes) - 1)), linewidth=WIDTH, label=f"layer {layer}")
    axis.set_ylabel("norm of the state, mean over heads")
    axis.set_xlabel("position of the written token")
    axis.set_ylim(bottom=0)
    finish(figure, [axis])
    return figure


def read_figure(trace: Trace, title: str, row: int = 0) -> Figure:
    """‖memory‖ / ‖exact attention‖ in the residual stream by layer: all heads together, and each head's own part."""
    trace.something()
    figure, (axis,) = new_figure(1, title)
    reads = trace.reads
    for n, r in enumerate(reads.values()):
        real = r.positions[row] >= 0
        axis.bar(n, _ratio(r.memory[row, real], r.exact[row, real]), color=AHN, alpha=0.8, label=None if n else "layer")
        heads = [_ratio(m[real], e[real]) for m, e in zip(r.head_memory[row], r.head_exact[row], strict=True)]
        axis.plot([n] * len(heads), heads, "o", color=INK, markersize=4, label=None if n else "its heads")
    axis.set_xticks(*_some(range(len(reads)), list(reads)))
    axis.set_xlabel("layer")
    axis.set_ylabel("read, as a multiple of exact attention")
    finish(figure, [axis])
    return figure


def kind_figure(kinds: Sequence[KindWrites], title: str) -> Figure:
    """Write strength and update by kind of token, with 95 % intervals."""
    figure, (strength, update) = new_figure(2, title)
    order = list(reversed(kinds))
    _bars(strength, order, [entry.strength for entry in order], MUTED)
    _bars(update, order, [entry.update for entry in order], AHN)
    strength.set_title("Write strength; lines: 95 % intervals", fontsize=10, loc="left")
    update.set_title("Update of the state, relative to the head's mean", fontsize=10, loc="left")
    update.axvline(1, color=INK, linestyle=DASHED, linewidth=1)
    return figure


def _some(places: Sequence[float], layers: Sequence[int]) -> tuple[Sequence[float], list[str]]:
    """Places and names of so few layers, evenly apart, that the names do not touch."""
    step = -(-len(layers) // NAMED)
    return places[::step], [str(layer) for layer in layers[::step]]


def _bars(axis: Any, kinds: Sequence[KindWrites], means: Sequence[Mean], colour: str) -> None:
    half = [mean.high - mean.value for mean in means]
    axis.barh([entry.kind for entry in kinds], [mean.value for mean in means], xerr=half, color=colour, ecolor=INK)


def _ratio(memory: Tensor, exact: Tensor) -> float:
    return float((memory / exact.clamp_min(1e-12)).mean())


def _time(trace: Trace, row: int) -> tuple[Tensor, list[float]]:
    """Columns in which the row wrote, and the edges of the bins over the positions of its tokens."""
    positions = next(iter(trace.something().values())).positions[row]
    real = positions >= 0
    first, last = int(positions[real].min()), int(positions[real].max()) + 1
    return real, torch.linspace(first, last, min(BINS, last - first) + 1).tolist()


def _binned(x: Tensor, bins: int) -> Tensor:
    """(H, N) to means (H, bins)."""
    return torch.nn.functional.adaptive_avg_pool1d(x[None].float(), bins)[0]

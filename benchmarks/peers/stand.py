"""Where ours and transformers' rows are measured: the model with random weights, and the machine in a row."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from plan import Rows, held

from ahn.bench import ceilings
from ahn.bench.model import load
from ahn.bench.records import code, hardware
from ahn.bench.stand import BenchSettings, Stand
from ahn.cli.env import environment
from ahn.measure.clock import release

MARGIN = 0.93
"""Of the free memory that conversations are given at first, and of their number after each time it was too much."""


def make(options: argparse.Namespace, rows: Rows) -> Stand:
    """The stand; a row says what machine it is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = ceilings.measure(device, dtype)
    rows.write(hardware=hardware(device), environment=environment(), code=code(), ceilings=dataclasses.asdict(rates))
    rows.shared |= {"model": options.model}
    loaded = load(options.model, True, device, dtype)
    return Stand(loaded.model, rates, BenchSettings(repeats=options.repeats, budget=20.0))


def together(stand: Stand, each: int, work: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """`work` with as many conversations as the memory holds.

    Args:
        each: bytes of a conversation.
        work: measures so many.
    """
    release(stand.device)
    free = torch.cuda.mem_get_info(stand.device)[0] if stand.device.type == "cuda" else 8 * each
    batch = held(MARGIN * free, each, 1 << 20)
    while True:
        try:
            return {"batch": batch, **work(batch)}
        except RuntimeError as error:  # a capture that runs out of memory has no error of its own
            if batch == 1 or "out of memory" not in str(error):
                raise
        release(stand.device)  # outside `except`: the error holds what filled the memory
        batch = max(1, int(MARGIN * batch))

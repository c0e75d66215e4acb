"""Ours: sinks, window and a memory, as `ahn bench` measures them."""

from __future__ import annotations

import argparse
from typing import Any

import stand
import torch
from plan import TOGETHER, Rows

from ahn.bench import decode, prefill
from ahn.bench.methods import make_methods
from ahn.measure.clock import release


def measure(options: argparse.Namespace, rows: Rows) -> None:
    """Rows of all contexts."""
    here = stand.make(options, rows)
    (method,) = make_methods([options.memory], options.window, options.sinks)
    rows.shared |= {"method": method.name, "window": options.window, "sinks": options.sinks}
    with method.on(here.model), torch.inference_mode():
        for index, context in enumerate(options.contexts):
            what: dict[str, Any] = {"context": context, "batch": 1}
            rows.measure(lambda: prefill.measure(here, method, context, 1), measurement="prefill", **what)  # noqa: B023
            release(here.device)
            found = rows.measure(
                lambda: decode.measure(here, method, context, 1),  # noqa: B023
                measurement="decode",
                **what,
            )
            if found is not None and index < TOGETHER:
                each = found["cache_bytes"]
                rows.measure(
                    lambda: stand.together(here, each, lambda n: decode.throughput(here, method, context, n)),  # noqa: B023
                    measurement="throughput",
                    context=context,
                )
            release(here.device)

"""Draw report.md, results.jsonl and figures/ again from the rows in this folder, which two recipes made."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "quality"))

from stages.recipe import Run, Tier  # noqa: E402
from stages.recipes import LONG, STUDY  # noqa: E402
from stages.report import report  # noqa: E402

ROUTED, DELTANET = {"memory": "routed_deltanet"}, {"memory": "deltanet"}
BESIDE = {"lr": 0.0}
"""A change, so that the row stands beside the memory that it changes; which one it was is in README.md."""
HALF = Tier(exact=0.5, bytes_of="routed_deltanet")
RUNS = (
    Run("deltanet", far=True),
    Run("routed_deltanet", seeds=(0, 1, 2), far=True),
    Run("routed_deltanet-long", ROUTED, LONG, far=True),
    Run("two_bits-half", {"memory": "window_only"}, tier=Tier(exact=0.5, bytes_of="gated_deltanet")),
    Run("two_bits-half+routed_deltanet-short", ROUTED, tier=HALF, of="routed_deltanet"),
    Run("two_bits-half+routed_deltanet", ROUTED, far=True, tier=HALF, of="routed_deltanet-long"),
    *[Run(f"deltanet-{name}", DELTANET, BESIDE) for name in ("mixed", "4states", "4hash")],
    *[Run(f"routed_{name}", ROUTED, BESIDE) for name in ("shared", "8")],
    *[Run(f"deltanet-{name}", DELTANET, BESIDE) for name in ("negative", "unfrozen", "coded")],
)

report(dataclasses.replace(STUDY, runs=RUNS), HERE)

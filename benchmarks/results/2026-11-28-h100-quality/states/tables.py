"""Draw report.md, results.jsonl and figures/ of this folder again, beside the rows of the folder above."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "quality"))

from stages.recipe import Run, Tier  # noqa: E402
from stages.recipes import LONG, STUDY  # noqa: E402
from stages.report import report  # noqa: E402

THREE, ROUTED = (0, 1, 2), {"memory": "routed_deltanet"}
HALF = {name: Tier(exact=0.5, bytes_of=name) for name in ("deltanet", "routed_deltanet")}
RUNS = (
    Run("deltanet", seeds=THREE, far=True),
    Run("deltanet-long", {"memory": "deltanet"}, LONG, far=True),
    Run("routed_4", ROUTED, seeds=THREE, far=True),
    Run("routed_4-long", ROUTED, LONG, far=True),
    Run("routed_deltanet", seeds=THREE, far=True),
    Run("routed_deltanet-long", ROUTED, LONG, far=True),
    Run("routed_16", ROUTED, seeds=(0, 1), far=True),
    Run("two_bits-half+deltanet", {"memory": "deltanet"}, far=True, tier=HALF["deltanet"], of="deltanet"),
    Run("two_bits-half+routed_4-long", ROUTED, far=True, tier=HALF["routed_deltanet"], of="routed_4-long"),
    Run("two_bits-half+routed_deltanet", ROUTED, far=True, tier=HALF["routed_deltanet"], of="routed_deltanet-long"),
)

with tempfile.TemporaryDirectory() as name:
    both = Path(name)
    for folder in (HERE.parent, HERE):
        shutil.copytree(folder / "evaluation", both / "evaluation", dirs_exist_ok=True)
    for file in ("prepare.json", "base.json"):
        shutil.copy(HERE.parent / file, both)
    report(dataclasses.replace(STUDY, runs=RUNS), both)
    for file in ("report.md", "results.jsonl"):
        shutil.copy(both / file, HERE)
    shutil.copytree(both / "figures", HERE / "figures", dirs_exist_ok=True)

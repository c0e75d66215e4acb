"""Teach ahn-tiny's Routed DeltaNet positions for some minutes on a CPU: sequences start anywhere up to 32 768.

python moved.py RUN ADAPTER        # RUN: what `run.py prepare --recipe tiny` made; ADAPTER: where the memory goes
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "quality"))

from stages.batches import stored_batches
from stages.recipes import TINY
from transformers import AutoTokenizer

import ahn
from ahn import tiny
from ahn.training import StepLog, WindowSchedule, distill

STEPS = 100
settings = dataclasses.replace(TINY.distillation, steps=STEPS, length=2048, batch=1, facts=(12, 48))


def say(log: StepLog) -> None:
    print(log.step, round(log.kl, 4), flush=True)


run, out = Path(sys.argv[1]), sys.argv[2]
model = ahn.from_pretrained(tiny.adapter_path("routed_deltanet"), window=224, sinks=32, dtype="float32")
batches = stored_batches(TINY, settings, run, AutoTokenizer.from_pretrained(tiny.path()), seed=7)
schedule = WindowSchedule(
    totals=(128, 256, 512), sink_candidates=settings.sinks, lower_ratio=0, positions=32768, seed=1
)
distill(model, (batches[step] for step in range(STEPS)), STEPS, schedule, lr=5e-4, on_step=say)
ahn.save_adapter(model, out)

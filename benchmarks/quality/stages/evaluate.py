"""Stage `evaluate`: loss, distance from full attention, recall and needles of every memory and the baselines."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Qwen3ForCausalLM

from ahn.tiny.facts import FactWriter
from ahn.training.losses import Head

from .distill import marker
from .log import Clock, write_lines
from .probes import BUCKETS, Probes, by_distance, recalled
from .reading import Reading, method, reader
from .recipe import Context, Recipe, Task, training

TOKENS = 131072
"""Read at once, all rows of a batch together."""
ROWS = 16384
"""Positions whose logits exist at once."""
POINTS = 16
"""Of a curve over the positions of a text."""
PACKAGES = ("ahn", "torch", "transformers", "tokenizers", "numpy")


def rows_file(out: Path, task: Task) -> Path:
    """The rows of one task; it exists when they are complete."""
    return out / "evaluation" / f"{task.name}.jsonl"


@torch.no_grad()
def evaluate(recipe: Recipe, out: Path, tasks: list[Task], device: torch.device) -> None:
    """Measure the tasks that are trained and not measured yet: out/evaluation/<name>.jsonl, a line a condition.

    On a GPU everything is computed in bfloat16 (logits in float32), on a CPU in float32.
    """
    waiting = [task for task in tasks if not rows_file(out, task).exists()]
    needed = [training(task) for task in waiting]
    ready = [t for t, needs in zip(waiting, needed, strict=True) if needs is None or marker(out, needs).exists()]
    for task in waiting:
        if task not in ready:
            print(f"{task.name} is not trained yet: run `distill`", flush=True)
    if not ready:
        return
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Qwen3ForCausalLM.from_pretrained(out / "model", dtype=dtype).to(device).eval()
    facts = FactWriter(AutoTokenizer.from_pretrained(out / "model"))
    setup = {"versions": versions(), "device": _device_name(device), "dtype": str(dtype).removeprefix("torch.")}
    benches: dict[int, Bench] = {}
    clock = Clock()
    for task in ready:
        rows: list[dict[str, Any]] = []
        for context in recipe.contexts:
            if context.far and not (task.run.far and not task.seed):
                continue
            if context.length not in benches:
                benches[context.length] = Bench(model, Probes(out, facts, context))
                clock.say(f"full attention at {context.length}")
            trained = training(task)
            run = None if trained is None else recipe.run(trained.run.name)
            identity = {"recipe": recipe.fingerprint(run), **setup}
            for row in measure(recipe, out, task, model, benches[context.length], context):
                rows.append(identity | row)
            clock.say(f"{task.name} at {context.length}")
        write_lines(rows_file(out, task), rows)


class Bench:
    """A context's probes, and what full attention makes of its sequences: the teacher's hidden states (N, L, D)."""

    def __init__(self, model: PreTrainedModel, probes: Probes) -> None:
        self.probes, self.head = probes, Head.of(model)
        self.batch = rows_at_once(probes.context.length)
        self.ids = probes.chunks.to(model.device)
        hidden = reader(model)
        self.teacher = torch.cat([hidden(ids) for ids in self.ids.split(self.batch)])

    def losses(self, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
        """Cross entropy and KL(full attention ‖ this) in nats of each predicted token, both (N, L - 1)."""
        found = []
        for ids, teacher in zip(self.ids.split(self.batch), self.teacher.split(self.batch), strict=True):
            states = reading.hidden(ids)
            rows = [x[:, :-1].flatten(0, 1).split(ROWS) for x in (states, teacher)]
            parts = [
                token_losses(self.head, student, full, targets)
                for student, full, targets in zip(*rows, ids[:, 1:].flatten().split(ROWS), strict=True)
            ]
            found.append(torch.cat(parts, dim=1).view(2, len(ids), -1))
        ce, kl = torch.cat(found, dim=1).cpu().numpy()
        return ce, kl

    def recall(self, reading: Reading, texts: list[Any]) -> list[bool]:
        """Whether each fact was recalled."""
        batch = rows_at_once(len(texts[0].ids))
        return recalled(reading.hidden, self.head.logits, texts, self.probes.facts.values, batch)


def rows_at_once(length: int) -> int:
    """A power of two, so that few shapes occur: GPU kernels are chosen or built for each."""
    return 1 << (max(1, TOKENS // length).bit_length() - 1)


def token_losses(head: Head, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy and KL(teacher ‖ student) of rows (n, D), as (2, n) float32."""
    ours, theirs = (head.logits(x).log_softmax(-1) for x in (student, teacher))
    ce = -ours.gather(1, targets[:, None])[:, 0]
    return torch.stack([ce, (theirs.exp() * (theirs - ours)).sum(-1)])


def measure(
    recipe: Recipe, out: Path, task: Task, model: PreTrainedModel, bench: Bench, context: Context
) -> Iterator[dict[str, Any]]:
    """One row a budget. Full attention reads once; its rows differ in the positions that count."""
    full = task.run.name == "full"
    for budget in context.budgets[:1] if full else context.budgets:
        with method(model, out, task, budget, recipe.sinks, context.length) as reading:
            ce, kl = bench.losses(reading)
            right = bench.recall(reading, bench.probes.texts)
            found = {length: bench.recall(reading, [n.text for n in ns]) for length, ns in bench.probes.needles.items()}
        shared = {"method": task.run.name, "seed": task.seed, "context": context.length, **reading.about}
        shared |= {"needles": {str(length): _grid(bench.probes, length, hits) for length, hits in found.items()}}
        for counted in context.budgets if full else (budget,):
            yield shared | {"budget": counted} | summarise(bench.probes, ce, kl, right, counted, recipe.sinks)


def summarise(
    probes: Probes, ce: np.ndarray, kl: np.ndarray, right: list[bool], budget: int, sinks: int
) -> dict[str, Any]:
    """A row's numbers. Losses of tokens that are read after more than `budget` ones: ce, kl (N, L - 1)."""
    beyond = (slice(None), slice(budget, None))
    size = -(-ce.shape[1] // POINTS)
    facts = [fact for text in probes.texts for fact in text.facts]
    far = [
        hit
        for fact, hit in zip(facts, right, strict=True)
        if fact.distance > budget and fact.answer - fact.distance >= sinks
    ]
    return {
        "loss": round(float(ce[beyond].mean()), 5),
        "kl": round(float(kl[beyond].mean()), 5),
        "sources": probes.sources,
        "chunk_losses": _rounded(ce[beyond].mean(1)),
        "chunk_kl": _rounded(kl[beyond].mean(1)),
        "position_size": size,
        "loss_by_position": _rounded([ce[:, start : start + size].mean() for start in range(0, ce.shape[1], size)]),
        "loss_by_repeat": _by_repeat(ce[beyond], probes.repeats[beyond]),
        "recall": by_distance(probes.texts, right),
        "recall_beyond": [sum(far), len(far)],
        "recall_chance": round(1 / len(probes.facts.values), 4),
    }


def _by_repeat(ce: np.ndarray, distances: np.ndarray) -> dict[str, list[float]]:
    """Mean loss and number of tokens by how long ago their pair of tokens was last seen; "none" for never."""
    found: dict[str, list[float]] = {}
    edges = [*BUCKETS, np.inf]
    groups = {"none": distances == 0}
    groups |= {str(low): (distances > low) & (distances <= high) for low, high in itertools.pairwise(edges)}
    for name, chosen in groups.items():
        if chosen.any():
            found[name] = [round(float(ce[chosen].mean()), 5), int(chosen.sum())]
    return found


def _grid(probes: Probes, length: int, hits: list[bool]) -> dict[str, list[int]]:
    """Hits and needles by depth."""
    counts: dict[str, list[int]] = {}
    for needle, hit in zip(probes.needles[length], hits, strict=True):
        entry = counts.setdefault(str(needle.depth), [0, 0])
        entry[0] += hit
        entry[1] += 1
    return counts


def versions() -> dict[str, str]:
    """Whose versions can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # ahn, where it runs from its sources
            found[name] = importlib.metadata.version(name)
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]

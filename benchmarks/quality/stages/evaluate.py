"""Stage `evaluate`: loss, distance from full attention, recall and needles of every memory and the baselines."""

from __future__ import annotations

import contextlib
import dataclasses
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

from .log import Clock, write_lines
from .probes import BUCKETS, Probes, by_distance, read, recalled
from .reading import Reading, method, reader
from .recipe import Context, Recipe, Task, training

ROWS = 16
"""Sequences read at once. With a base this small a GPU waits for the host: the fewer steps, the sooner it is done."""
TOKENS = 1 << 19
"""Of them together, at most."""
POSITIONS = 16384
"""Whose logits exist at once."""
POINTS = 16
"""Of a curve over the positions of a text."""
PACKAGES = ("ahn", "torch", "transformers", "tokenizers", "numpy")


def rows_file(out: Path, task: Task) -> Path:
    """The rows of one task; it exists when they are complete."""
    return out / "evaluation" / f"{task.name}.jsonl"


class Evaluation:
    """Measures tasks one after another; what full attention makes of the probes is worked out once.

    On a GPU everything is computed in bfloat16 (logits in float32), on a CPU in float32.
    """

    def __init__(self, recipe: Recipe, out: Path, device: torch.device) -> None:
        self.recipe, self.out = recipe, out
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = Qwen3ForCausalLM.from_pretrained(out / "model", dtype=dtype).to(device).eval()
        self._facts = FactWriter(AutoTokenizer.from_pretrained(out / "model"))
        self._setup = {
            "versions": versions(),
            "device": _device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
        }
        self._benches: dict[int, Bench] = {}

    @torch.no_grad()
    def measure(self, task: Task) -> None:
        """Write out/evaluation/<name>.jsonl, a line a condition, when all of them are measured."""
        rows: list[dict[str, Any]] = []
        clock, trained = Clock(), training(task)
        run = None if trained is None else self.recipe.run(trained.run.name)
        identity = {"recipe": self.recipe.fingerprint(run), **self._setup}
        for context in self.recipe.contexts:
            if context.far and not (task.run.far and not task.seed):
                continue
            if context.length not in self._benches:
                self._benches[context.length] = Bench(self.model, Probes(self.out, self._facts, context))
                clock.say(f"full attention at {context.length}")
            bench = self._benches[context.length]
            for row in measure(self.recipe, self.out, task, self.model, bench, context):
                rows.append(identity | row)
            clock.say(f"{task.name} at {context.length}")
        write_lines(rows_file(self.out, task), rows)


class Bench:
    """A context's probes, and what full attention makes of its held-out sequences: their hidden states (L, D)."""

    def __init__(self, model: PreTrainedModel, probes: Probes) -> None:
        self.probes, self.head = probes, Head.of(model)
        self.ids = probes.chunks.to(model.device)
        self._rows = min(ROWS, max(1, TOKENS // probes.context.length))
        states = {number: x.clone() for number, x in read(reader(model), list(probes.chunks), self._rows)}
        self.teacher = [states[number] for number in range(len(self.ids))]

    def measure(self, reading: Reading) -> Measured:
        """Read everything and compare."""
        probes, chunks = self.probes, len(self.ids)
        needles = [needle.text for found in probes.needles.values() for needle in found]
        texts = [*probes.texts, *needles]
        losses: list[Any] = [None] * chunks
        hits: list[list[bool]] = [[] for _ in texts]
        for number, states in read(reading.hidden, [*probes.chunks, *[text.ids for text in texts]], self._rows):
            if number < chunks:
                parts = [x.split(POSITIONS) for x in (states[:-1], self.teacher[number][:-1], self.ids[number, 1:])]
                found = [token_losses(self.head, *part) for part in zip(*parts, strict=True)]
                losses[number] = torch.cat(found, dim=1)
            else:
                text = number - chunks
                hits[text] = recalled(states, self.head.logits, texts[text], probes.facts.values)
        ce, kl = torch.stack(losses, dim=1).cpu().numpy()
        facts, asked = hits[: len(probes.texts)], iter(hits[len(probes.texts) :])
        return Measured(
            ce,
            kl,
            recalled=[hit for text in facts for hit in text],
            needles={length: [next(asked)[0] for _ in found] for length, found in probes.needles.items()},
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """One reading of a bench.

    Attributes:
        ce, kl: (N, L - 1) cross entropy and KL(full attention ‖ this) in nats of each predicted token.
        recalled: whether each fact of the texts was recalled, text by text in the order of their facts.
        needles: whether each needle was found, by the length of their texts.
    """

    ce: np.ndarray
    kl: np.ndarray
    recalled: list[bool]
    needles: dict[int, list[bool]]


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
            found = bench.measure(reading)
        shared = {"method": task.run.name, "seed": task.seed, "context": context.length, **reading.about}
        shared["needles"] = {str(length): _grid(bench.probes, length, hits) for length, hits in found.needles.items()}
        for counted in context.budgets if full else (budget,):
            numbers = summarise(bench.probes, found.ce, found.kl, found.recalled, counted, recipe.sinks)
            yield shared | {"budget": counted} | numbers


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

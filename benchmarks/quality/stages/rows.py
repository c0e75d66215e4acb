"""Rows of all tasks, joined with full attention and sinks + window at the same context and budget, seeds together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .intervals import bootstrap
from .log import read_lines
from .recipe import BASELINES, Recipe

FULL, WINDOW = BASELINES[:2]
LONG = ("chunk_losses", "chunk_kl", "sources")
"""Keys that only the intervals need."""
Number = tuple[float, float, float]
"""A value and the ends of its 95 % interval."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One method at one context and budget: the rows of all its seeds, and the two rows that it is compared with."""

    method: str
    context: int
    budget: int
    seeds: list[dict[str, Any]]
    full: dict[str, Any]
    window: dict[str, Any]

    @property
    def first(self) -> dict[str, Any]:
        """The first seed's row."""
        return self.seeds[0]

    def like(self, other: Group) -> Group:
        """With the seeds of another group only, so that both learned from the same batches."""
        seeds = {row["seed"] for row in other.seeds}
        return dataclasses.replace(self, seeds=[row for row in self.seeds if row["seed"] in seeds])

    def chunks(self, name: str) -> np.ndarray:
        """A number a seed and sequence, (S, N)."""
        return np.array([row[name] for row in self.seeds])

    def won_back(self, row: dict[str, Any] | None = None) -> Number:
        """Share of the loss between sinks + window and full attention that this method wins back; of one seed's row."""
        losses = self.chunks("chunk_losses") if row is None else np.array(row["chunk_losses"])
        columns = [np.array(self.full["chunk_losses"]), np.array(self.window["chunk_losses"]), losses]
        return bootstrap(lambda full, window, own: (window - own) / (window - full), columns, self.full["sources"])

    def kl(self) -> Number:
        """KL from full attention, nats a token."""
        return bootstrap(lambda kl: kl, [self.chunks("chunk_kl")], self.full["sources"])

    def minus(self, other: Group, name: str) -> Number:
        """The difference to another method on the same sequences, with the same seeds."""
        columns = [self.chunks(name), other.chunks(name)]
        return bootstrap(lambda own, others: own - others, columns, self.full["sources"])

    def recall(self, bucket: str | None = None) -> tuple[float, int]:
        """Facts recalled and asked, from beyond the budget or from one bucket of distances; a seed, on average.

        All seeds are asked the same facts, so more of them do not make more facts.
        """
        return _a_seed([row["recall_beyond"] if bucket is None else row["recall"][bucket] for row in self.seeds])

    @property
    def cache_bytes(self) -> int:
        """Of a whole cache: keys and values, codes, states, and gates that wait."""
        return sum(self.first.get(f"{part}_bytes", 0) for part in ("kv", "quantized", "state", "gate"))

    def loss_above_full(self, first: int) -> float:
        """Mean loss above full attention's from token `first` on."""
        start = first // self.first["position_size"]
        return float(np.mean(self.mean("loss_by_position")[start:] - np.array(self.full["loss_by_position"])[start:]))

    def recalled_from(self, first: int) -> float:
        """Share of the facts recalled that were stated `first` tokens ago or earlier."""
        found = [self.recall(bucket) for bucket in self.first["recall"] if int(bucket) >= first]
        return sum(hits for hits, _ in found) / max(sum(asked for _, asked in found), 1)

    def by_repeat(self, row: dict[str, Any]) -> np.ndarray:
        """What a row wins back, in parts that add up to its share of the whole gap between sinks + window and full.

        Of tokens whose pair was never seen before, was last seen within the budget, and longer ago: (3,).
        """
        window, full, own = (each["loss_by_repeat"] for each in (self.window, self.full, row))
        gap = sum(number * (loss - full[name][0]) for name, (loss, number) in window.items())
        parts = np.zeros(3)
        for name, (loss, number) in window.items():
            place = 0 if name == "none" else 1 + (int(name) >= self.budget)
            parts[place] += number * (loss - own[name][0]) / gap
        return parts

    def mean(self, name: str) -> np.ndarray:
        """A number or a list of numbers, averaged over seeds."""
        return np.mean([row[name] for row in self.seeds], axis=0)

    def needles(self, length: str, depth: str) -> tuple[float, int]:
        """Needles found and asked at one length and depth; a seed, on average."""
        return _a_seed([row["needles"][length][depth] for row in self.seeds if length in row["needles"]])


def _a_seed(counts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Hits, on average, and how many were asked, of (hits, asked) of each seed."""
    ((asked,),) = [{number for _, number in counts}]
    return sum(hits for hits, _ in counts) / len(counts), asked


class Results:
    """Everything that has been measured so far in a folder."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        order = [*BASELINES, *[run.name for run in recipe.runs]]
        rows = [row for file in sorted((out / "evaluation").glob("*.jsonl")) for row in read_lines(file)]
        known = sorted((row for row in rows if row["method"] in order), key=lambda row: row["seed"] or 0)
        self.recipe = recipe
        self.groups: list[Group] = []
        places = {(row["context"], row["budget"]) for row in known}
        for context, budget in sorted(places):
            here = [row for row in known if (row["context"], row["budget"]) == (context, budget)]
            by_method = {name: [row for row in here if row["method"] == name] for name in order}
            if not (by_method[FULL] and by_method[WINDOW]):
                continue  # nothing to compare with yet
            ends = by_method[FULL][0], by_method[WINDOW][0]
            self.groups += [Group(name, context, budget, rows, *ends) for name, rows in by_method.items() if rows]

    def at(self, context: int, budget: int) -> list[Group]:
        """Methods measured there, baselines first."""
        return [group for group in self.groups if (group.context, group.budget) == (context, budget)]

    def places(self, far: bool) -> list[tuple[int, int]]:
        """Contexts and budgets, the long ones or the others."""
        lengths = [context.length for context in self.recipe.contexts if context.far == far]
        return sorted({(g.context, g.budget) for g in self.groups if g.context in lengths})

    def pairs(self) -> list[tuple[Group, Group]]:
        """Runs that train a memory in another way, each with the run that trains it as the recipe says."""
        found = []
        for context, budget in self.places(far=False):
            here = {group.method: group for group in self.at(context, budget)}
            for group in here.values():
                other = here.get(self.reference(group.method) or "")
                same = None if other is None else other.like(group)
                if same is not None and same.seeds:
                    found.append((group.like(same), same))
        return found

    def between_seeds(self, group: Group, name: str) -> float:
        """How far apart the seeds of a group's method are at most, those that the group is without included."""
        here = next(each for each in self.at(group.context, group.budget) if each.method == group.method)
        values = [row[name] for row in here.seeds]
        return max(values) - min(values)

    def reference(self, method: str) -> str | None:
        """The run that trains the same memory with the recipe's own settings; None for that run and for a tier's."""
        runs = {run.name: run for run in self.recipe.runs}
        if method not in runs or runs[method].tier is not None:
            return None
        plain = runs.get(runs[method].settings["memory"])
        return None if plain is None or plain.name == method else plain.name

    def stands_alone(self, method: str) -> bool:
        """Whether it is listed among the methods: all but ablations, which only stand beside what they change.

        A run that is measured at the long contexts is a method, however it was trained.
        """
        return self.reference(method) is None or any(run.name == method and run.far for run in self.recipe.runs)

    def rows(self) -> list[dict[str, Any]]:
        """A row a seed, as results.jsonl has them."""
        found = []
        for group in self.groups:
            for row in group.seeds:
                light = {name: value for name, value in row.items() if name not in LONG}
                ends = {"loss_full": group.full["loss"], "loss_window": group.window["loss"]}
                won_back = [round(number, 4) for number in group.won_back(row)]
                parts = [round(float(part), 4) for part in group.by_repeat(row)]
                ends |= {"kl_window": group.window["kl"], "won_back": won_back, "won_back_by_repeat": parts}
                found.append(light | ends)
        return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The range over seeds, in brackets; nothing for one."""
    return f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""

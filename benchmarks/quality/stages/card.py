"""Stage `card`: the model card of ahn-tiny from the run's own files, and all that ships copied into the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ahn import tiny
from ahn.tiny.corpus import HELD_OUT
from ahn.tiny.facts import QUESTION, STATEMENT

from .distill import adapter
from .log import read_lines
from .recipe import SEED, Distillation, Recipe, Run, tasks
from .rows import FULL, WINDOW, Group, Results

PACKAGE = Path(tiny.__file__).parent

CARD = Path(__file__).with_name("card.md")


def write_card(recipe: Recipe, out: Path) -> None:
    """Write out/README.md from the run's logs and rows."""
    prepared = json.loads((out / "prepare.json").read_text())
    base = json.loads((out / "base.json").read_text())
    trained = [entry for entry in read_lines(out / "base.jsonl") if "loss" in entry]
    results = Results(recipe, out)
    settings = recipe.distillation
    budget = recipe.contexts[0].budgets[0]
    phases = ", ".join(
        f"{p.steps} of {p.batch} times {p.length} tokens with {p.facts[0]} to {p.facts[1]} facts"
        + (f" at most {p.reach} tokens away" if p.reach else "")
        for p in recipe.phases
    )
    text = CARD.read_text().format(
        **{name: getattr(recipe, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "warmup")},
        **{name: getattr(recipe, name) for name in ("matrix_lr", "matrix_decay", "other_lr", "cooldown", "steps")},
        **{name: getattr(recipe, name) for name in ("answer_weight", "sinks")},
        lossless=budget,
        window=budget - recipe.sinks,
        parameters=base["parameters"] / 1e6,
        vocabulary=prepared["vocabulary"],
        python=prepared["python"],
        documents=prepared["train_documents"],
        characters=prepared["train_characters"] / 1e6,
        tokens=prepared["train_tokens"] / 1e6,
        per_token=prepared["characters_per_token"],
        held_out=", ".join(HELD_OUT),
        statement=STATEMENT.strip().format(key="<key>", value="<value>"),
        question=QUESTION.strip().format(key="<key>", value="<value>"),
        rename=recipe.rename_share,
        seed=SEED,
        seen=base["tokens"] / 1e6,
        seconds=base["seconds"],
        device=base["device"],
        phases=phases,
        train_loss=trained[-1]["loss"],
        base_rows="\n".join(_base_row(results, context, budget) for context, _ in results.places(far=False)),
        distill_steps=settings.steps,
        distill_batch=settings.batch,
        distill_length=settings.length,
        distill_lr=settings.lr,
        totals=", ".join(map(str, settings.totals)),
        sink_choices=", ".join(map(str, settings.sinks)),
        start=_start(settings),
        chunks=recipe.contexts[0].chunks,
        where=_where(results),
        tiers="".join(_tier(results, run) for run in recipe.runs if run.tier is not None),
        memory_rows="\n".join(_memory_row(group) for run in recipe.runs for group in _of(results, run.name)),
    )
    (out / "README.md").write_text(text)


def _start(settings: Distillation) -> str:
    if settings.horizons is None:
        return ""
    shortest, longest = settings.horizons
    return f". Where a memory forgets, its\nheads begin with e-folds of {shortest:g} to {longest:g} tokens"


def _where(results: Results) -> str:
    """What the rows were measured on: "in bfloat16 on … (…: in float32 on …)", the trained memories' place first."""
    methods: dict[str, list[str]] = {}
    for group in sorted(results.groups, key=lambda group: group.first["seed"] is None):
        named = methods.setdefault(f"in {group.first['dtype']} on {group.first['device']}", [])
        named += [group.method] if group.method not in named else []
    usual, *others = methods
    return usual + "".join(f" ({', '.join(methods[place])}: {place})" for place in others)


def _tier(results: Results, run: Run) -> str:
    """A sentence about a run with tokens at two bits."""
    quantized = _of(results, run.name)[0].first["quantized"]
    behind = f"the memory of `{run.of}`" if run.of else "no memory"
    return (
        f"\n`{run.name}` sees {quantized} tokens before the window at two bits a number, with {behind} behind them; "
        "nothing is trained for it."
    )


def install(recipe: Recipe, out: Path) -> None:
    """Copy model, trained adapters and card into the package."""
    shutil.copy(out / "README.md", PACKAGE / "README.md")
    shutil.copytree(out / "model", PACKAGE / "model", dirs_exist_ok=True)
    for task in [task for task in tasks(recipe) if task.seed is not None]:
        shutil.copytree(adapter(out, task), PACKAGE / "adapters" / task.name, dirs_exist_ok=True)


def _of(results: Results, method: str) -> list[Group]:
    return [group for group in results.groups if group.method == method]


def _beyond(row: dict[str, Any], lossless: int) -> str:
    """Facts recalled from farther back than the lossless total, by distance: "97 % from 256, …"."""
    found = {int(low): counts for low, counts in row["recall"].items() if int(low) >= lossless}
    return ", ".join(f"{100 * hits / asked:.0f} % from {low}" for low, (hits, asked) in found.items())


def _base_row(results: Results, context: int, budget: int) -> str:
    full, window = ({g.method: g for g in results.at(context, budget)}[name].first for name in (FULL, WINDOW))
    losses = f"{full['loss']:.3f} | {window['loss']:.3f}"
    return f"| {context} | {losses} | {_beyond(full, 0)} | {_beyond(window, budget)} |"


def _memory_row(group: Group) -> str:
    losses = [f"{row['loss']:.3f}" for row in (group.full, group.window, group.first)]
    won = f"{100 * group.won_back()[0]:.0f} %"
    columns = [group.method, group.first["parameters"], group.context, *losses, won, _beyond(group.first, group.budget)]
    return "| " + " | ".join(map(str, columns)) + " |"

"""Stage `card`: the model card from the run's own logs, and everything that ships copied into the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ahn import tiny
from ahn.tiny.corpus import HELD_OUT
from ahn.tiny.facts import QUESTION, STATEMENT

from .recipe import MEMORIES, SEED, Recipe

PACKAGE = Path(tiny.__file__).parent

CARD = Path(__file__).with_name("card.md")


def write_card(recipe: Recipe, out: Path) -> None:
    """Write out/README.md from the run's logs."""
    prepared = json.loads((out / "prepare.json").read_text())
    base = _read(out / "base.jsonl")
    settings = recipe.distillation
    final = [entry for entry in base if entry.get("final")]
    trained = [entry for entry in base if "loss" in entry]
    phases = ", ".join(
        f"{p.steps} of {p.batch} times {p.length} tokens with {p.facts[0]} to {p.facts[1]} facts"
        + (f" at most {p.reach} tokens away" if p.reach else "")
        for p in recipe.phases
    )
    text = CARD.read_text().format(
        **{name: getattr(recipe, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "warmup")},
        **{name: getattr(recipe, name) for name in ("matrix_lr", "matrix_decay", "other_lr", "cooldown", "steps")},
        **{name: getattr(recipe, name) for name in ("answer_weight", "lossless", "sinks", "window")},
        parameters=base[0]["parameters"] / 1e6,
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
        seen=sum(p.steps * p.batch * p.length for p in recipe.phases) / 1e6,
        seconds=trained[-1]["seconds"],
        device=base[0]["device"],
        phases=phases,
        train_loss=trained[-1]["loss"],
        base_rows="\n".join(_base_row(entry, recipe.lossless) for entry in final),
        distill_steps=settings.steps,
        distill_batch=settings.batch,
        distill_length=settings.length,
        distill_lr=settings.lr,
        totals=", ".join(map(str, settings.totals)),
        sink_choices=", ".join(map(str, settings.sinks)),
        chunks=recipe.evaluation_chunks,
        memory_rows="\n".join(row for memory in MEMORIES for row in _memory_rows(out, memory, recipe)),
    )
    (out / "README.md").write_text(text)


def install(out: Path) -> None:
    """Copy model, adapters and card into the package."""
    shutil.copy(out / "README.md", PACKAGE / "README.md")
    shutil.copytree(out / "model", PACKAGE / "model", dirs_exist_ok=True)
    for memory in MEMORIES:
        shutil.copytree(out / "adapters" / memory, PACKAGE / "adapters" / memory, dirs_exist_ok=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _beyond(entry: dict[str, Any], name: str, lossless: int) -> str:
    """Facts recalled from farther back than the lossless total, by distance: "97 % (256 to 1024), …"."""
    prefix = f"recall_{name}_from"
    lows = [int(key.removeprefix(prefix)) for key in entry if key.startswith(prefix)]
    return ", ".join(f"{100 * entry[f'{prefix}{low}']:.0f} % from {low}" for low in lows if low >= lossless)


def _base_row(entry: dict[str, Any], lossless: int) -> str:
    window = f"window{lossless}"
    losses = f"{entry['loss_full']:.3f} | {entry[f'loss_{window}']:.3f}"
    return f"| {entry['length']} | {losses} | {_beyond(entry, 'full', 0)} | {_beyond(entry, window, lossless)} |"


def _memory_rows(out: Path, memory: str, recipe: Recipe) -> list[str]:
    entries = _read(out / f"distill-{memory}.jsonl")
    parameters = next(entry["parameters"] for entry in entries if "parameters" in entry)
    rows = []
    for length in (recipe.evaluation_length, 2 * recipe.evaluation_length):
        at = [entry for entry in entries if entry.get("length") == length]
        full, before, after = (
            next(entry for entry in at if f"loss_{name}" in entry) for name in ("full", "before", "after")
        )
        losses = full["loss_full"], before["loss_before"], after["loss_after"]
        won = (losses[1] - losses[2]) / (losses[1] - losses[0])
        recalled = _beyond(after, "after", recipe.lossless)
        columns = [memory, parameters, length, *(f"{loss:.3f}" for loss in losses), f"{100 * won:.0f} %", recalled]
        rows.append("| " + " | ".join(map(str, columns)) + " |")
    return rows

"""Stage `report`: all rows as results.jsonl, report.md with the tables, and the figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import figures
from .intervals import wilson
from .log import write_lines, write_text
from .recipe import Recipe
from .rows import FULL, WINDOW, Group, Number, Results, spread


def report(recipe: Recipe, out: Path) -> None:
    """Write out/results.jsonl, out/report.md and out/figures/ from whatever has been measured so far."""
    results = Results(recipe, out)
    write_lines(out / "results.jsonl", results.rows())
    names = figures.draw(results, out / "figures") if results.groups else []
    write_text(out / "report.md", "\n".join(_page(results, out, names)))
    print(f"{len(results.rows())} rows; see {out / 'report.md'}", flush=True)


def _page(results: Results, out: Path, pictures: Sequence[str]) -> Iterable[str]:
    yield "# What the memories win back\n"
    yield from _setup(results, out)
    if not results.groups:
        yield "Nothing has been measured beside full attention and sinks + window yet."
        return
    for far in (False, True):
        for context, budget in results.places(far):
            yield f"\n## {budget} tokens kept exactly, {context} read\n"
            yield from _table([g for g in results.at(context, budget) if results.stands_alone(g.method)])
    yield from _ablations(results)
    yield "\n## Figures\n"
    yield from (f"![{name}](figures/{name}.png)\n" for name in pictures)


def _setup(results: Results, out: Path) -> Iterable[str]:
    prepared = json.loads((out / "prepare.json").read_text())
    recipe = f"recipe `{results.recipe.name}` ({results.recipe.fingerprint()})"
    if (out / "base.json").exists():
        base = json.loads((out / "base.json").read_text())
        yield (
            f"Base model: {base['parameters'] / 1e6:.1f} M parameters, trained on {base['tokens'] / 1e6:.0f} M tokens "
            f"of {prepared['train_tokens'] / 1e6:.1f} M in {base['seconds']:.0f} s on {base['device']}; {recipe}.\n"
        )
    else:
        yield f"The base model's training was cut: these are the weights it had saved; {recipe}.\n"
    yield f"Held out: {', '.join(prepared['held_out_tokens'])}.\n"
    yield (
        "All methods see equally many keys a layer: sinks + window, and slots where a memory has them. Tokens at two "
        "bits a number come on top, or in place of half of the exact ones: compare those rows by their bytes. Losses "
        "are nats a token, over tokens read after more than the budget. *Won back*: share of the loss between sinks + "
        "window and full attention. Square brackets: 95 % intervals, over held-out documents (losses) and Wilson's "
        "(shares); round ones: the range over seeds. *Recalled*: facts stated before the budget. *Needles*: single "
        "facts, all depths and lengths."
    )


def _table(groups: Sequence[Group]) -> Iterable[str]:
    heads = ("method", "parameters", "exact", "two bits", "state KiB", "keys, values KiB")
    heads += ("loss", "won back %", "KL", "recalled %", "needles %")
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for group in groups:
        first = group.first
        kept = first["kv_bytes"] + first.get("quantized_bytes", 0)
        state = (first["state_bytes"] + first["gate_bytes"]) / 1024
        cells = [
            group.method,
            f"{first['parameters']}",
            f"{first['sinks'] + first['window']}",
            f"{first.get('quantized', 0)}",
            f"{state:.0f}",
            f"{kept / 1024:.0f}",
            f"{group.mean('loss'):.4f}",
            _won_back(group),
            f"{group.kl()[0]:.4f}",
            _share(*group.recall()),
            _share(*_all_needles(group)),
        ]
        yield "| " + " | ".join(cells) + " |"


def _won_back(group: Group) -> str:
    if group.method in (FULL, WINDOW):
        return ""
    if group.window["loss"] <= group.full["loss"]:
        return "full attention is no better"  # beyond the lengths that the base model knows
    return percent(group.won_back()) + spread([100 * group.won_back(row)[0] for row in group.seeds])


def _ablations(results: Results) -> Iterable[str]:
    pairs = results.pairs()
    if not pairs:
        return
    yield "\n## Trained in other ways\n"
    yield (
        "Differences to the same memory trained as the recipe says, with the same seeds and on the same sequences; "
        "positive is worse.\n"
    )
    yield "| run | compared with | budget | loss, mnat | KL, mnat | KL is | won back % | recalled % | the other's |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for group, reference in pairs:
        cells = [
            group.method,
            reference.method,
            str(group.budget),
            _signed(group.minus(reference, "chunk_losses")),
            _signed(group.minus(reference, "chunk_kl")),
            _verdict(group.minus(reference, "chunk_kl")),
            percent(group.won_back()),
            _share(*group.recall()),
            _share(*reference.recall()),
        ]
        yield "| " + " | ".join(cells) + " |"


def _verdict(difference: Number) -> str:
    _, low, high = difference
    return "worse" if low > 0 else "better" if high < 0 else "not told apart"


def percent(number: Number) -> str:
    """A share with its interval."""
    value, low, high = (100 * part for part in number)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _signed(number: Number) -> str:
    value, low, high = (1000 * part for part in number)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _share(hits: int, total: int) -> str:
    if total == 0:
        return ""
    low, high = wilson(hits, total)
    return f"{100 * hits / total:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _all_needles(group: Group) -> tuple[int, int]:
    cells = [group.needles(length, depth) for length, grid in group.first["needles"].items() for depth in grid]
    return sum(hits for hits, _ in cells), sum(asked for _, asked in cells)

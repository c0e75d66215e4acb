"""Stage `report`: all rows as results.jsonl, report.md with the tables, and the figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ahn.measure.intervals import wilson

from . import figures
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
            groups = [g for g in results.at(context, budget) if results.stands_alone(g.method)]
            yield from _table(groups)
            if not far:
                yield from _gap(groups)
    yield from _costs(results)
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
        "window and full attention. Numbers are means over seeds. Square brackets: 95 % intervals, of losses over "
        "held-out documents and, where there are several, seeds, of shares Wilson's over the facts that a seed is "
        "asked; round ones: the range over seeds. *Recalled*: facts stated before the budget. *Needles*: single facts, "
        "all depths and lengths."
    )


def _table(groups: Sequence[Group]) -> Iterable[str]:
    heads = ["method", "seeds", "parameters", "exact", "two bits", "state KiB", "keys, values KiB"]
    heads += ["loss", "won back %", "KL", "recalled %", "needles %"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for group in groups:
        first = group.first
        kept = first["kv_bytes"] + first.get("quantized_bytes", 0)
        state = (first["state_bytes"] + first["gate_bytes"]) / 1024
        cells = [
            group.method,
            "" if first["seed"] is None else f"{len(group.seeds)}",
            f"{first['parameters']}",
            f"{first['sinks'] + first['window']}",
            f"{first.get('quantized', 0)}",
            f"{state:.0f}",
            f"{kept / 1024:.0f}",
            f"{group.mean('loss'):.4f}" + spread([row["loss"] for row in group.seeds], 4),
            _won_back(group),
            f"{group.mean('kl'):.4f}" + spread([row["kl"] for row in group.seeds], 4),
            _recalled(group),
            _share(*_all_needles(group)),
        ]
        yield "| " + " | ".join(cells) + " |"


def _gap(groups: Sequence[Group]) -> Iterable[str]:
    """Which tokens the gap is made of, and which of them each method wins back."""
    yield (
        "\nTokens by how long ago the same pair of tokens was last seen, and what each method wins back of them, in % "
        "of the whole gap (full attention: what the gap is made of):\n"
    )
    counts = groups[0].full["loss_by_repeat"]
    total = sum(number for _, number in counts.values())
    budget = groups[0].budget
    near = sum(number for name, (_, number) in counts.items() if name != "none" and int(name) < budget)
    shares = [counts.get("none", (0, 0))[1], near]
    shares.append(total - sum(shares))
    heads = ["method", "never", f"within {budget} tokens", "longer ago"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    yield "| % of the tokens | " + " | ".join(f"{100 * share / total:.1f}" for share in shares) + " |"
    for group in groups:
        if group.method != WINDOW:
            parts = sum(group.by_repeat(row) for row in group.seeds) / len(group.seeds)
            yield f"| {group.method} | " + " | ".join(f"{100 * part:+.1f}" for part in parts) + " |"


def _costs(results: Results) -> Iterable[str]:
    """What the figure `cost` shows."""
    context, most = results.places(far=False)[-1]
    yield (
        f"\n## By bytes of the cache, {context} read\n\nAll rows are about the same tokens, from token {most} on, and "
        f"the same facts, stated {most} tokens ago or earlier.\n"
    )
    yield "| method | budget | cache KiB | nats above full attention | recalled % |\n|---|---|---|---|---|"
    shown = [g for g in results.groups if g.context == context and g.method != FULL and results.stands_alone(g.method)]
    for group in sorted(shown, key=lambda group: group.cache_bytes):
        kib, loss, share = group.cache_bytes / 1024, group.loss_above_full(most), 100 * group.recalled_from(most)
        yield f"| {group.method} | {group.budget} | {kib:.0f} | {loss:.4f} | {share:.1f} |"


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
        "Differences to the same memory trained as the recipe says, with the same seeds, and so the same batches, and "
        "on the same sequences; positive is worse. With one seed the intervals do not contain what another would "
        "change: *between seeds* is how far apart the KL of the other's seeds lies.\n"
    )
    heads = ["run", "compared with", "seeds", "budget", "loss, mnat", "KL, mnat", "between seeds", "KL is"]
    heads += ["won back %", "recalled %", "the other's"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for group, reference in pairs:
        kl, between = group.minus(reference, "chunk_kl"), results.between_seeds(reference, "kl")
        cells = [
            group.method,
            reference.method,
            str(len(group.seeds)),
            str(group.budget),
            _signed(group.minus(reference, "chunk_losses")),
            _signed(kl),
            f"{1000 * between:.1f}" if between else "",
            _verdict(kl, between),
            percent(group.won_back()),
            _recalled(group),
            _recalled(reference),
        ]
        yield "| " + " | ".join(cells) + " |"


def _verdict(difference: Number, between: float) -> str:
    value, low, high = difference
    if low <= 0 <= high:
        return "not told apart"
    return ("worse" if low > 0 else "better") + (", less than between seeds" if abs(value) <= between else "")


def percent(number: Number) -> str:
    """A share with its interval."""
    value, low, high = (100 * part for part in number)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _signed(number: Number) -> str:
    value, low, high = (1000 * part for part in number)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _recalled(group: Group) -> str:
    counts = [row["recall_beyond"] for row in group.seeds]
    return _share(*group.recall()) + spread([100 * hits / max(asked, 1) for hits, asked in counts])


def _share(hits: float, total: int) -> str:
    if total == 0:
        return ""
    low, high = wilson(hits, total)
    return f"{100 * hits / total:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _all_needles(group: Group) -> tuple[float, int]:
    cells = [group.needles(length, depth) for length, grid in group.first["needles"].items() for depth in grid]
    return sum(hits for hits, _ in cells), sum(asked for _, asked in cells)

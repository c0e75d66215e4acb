"""`ahn inspect`: what a memory writes of a text, and what its reads give."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ahn.cli import common
from ahn.cli.generate import read_text
from ahn.errors import AHNError
from ahn.files import check_folder

if TYPE_CHECKING:
    from ahn.inspect import KindWrites, Mean, Trace

WINDOW, SINKS = 224, 32
LENGTH = 8192


def command(
    model: common.ModelOption = None,
    adapter: common.AdapterOption = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Read this file instead of a module of the standard library.")
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens to read, at most.")] = LENGTH,
    window: Annotated[int, typer.Option("--window", min=1, help="Last tokens kept exactly.")] = WINDOW,
    sinks: Annotated[int, typer.Option("--sinks", min=0, help="First tokens kept exactly.")] = SINKS,
    out: Annotated[Path, typer.Option("--out", help="Directory for the figures.")] = Path("ahn-inspect"),
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Look into a memory while it reads a text.

    One table has a line per layer: how strongly it writes, how large its states
    are at the end, how many of its heads remember longer than the window
    (half of what they hold outlives as many writes), and what its reads add
    to the residual stream next to exact attention. The other has a line per
    kind of token: numbers, names, keywords, operators, whitespace, strings and
    comments. The figures show the same over time.

    \b
    Examples:
      ahn inspect
      ahn inspect --model BASE --adapter AHN --text book.txt --window 2016
    """
    from ahn.cli.session import open_session
    from ahn.inspect import record, token_kinds
    from ahn.measure.reading import chunk_size, in_chunks, new_cache

    check_folder(out)
    name, content = _longest_module() if text is None else (text.name, read_text(text))
    session = open_session(model, adapter, device, dtype, window=window, sinks=sinks, quantized=0)
    ids = session.encode(content, start=True)[:length]
    if len(ids) <= window + sinks:
        raise AHNError(f"{name} has {len(ids)} tokens, which all stay exact ({sinks} sinks + window {window}).")
    with record(session.model) as trace, common.progress() as bar:
        task = bar.add_task("reading", total=len(ids))
        cache, size = new_cache(session.model), chunk_size(session.model)  # a session keeps the last token for later
        for read, _ in in_chunks(session.model, cache, ids, 0, len(ids), size):
            bar.update(task, completed=read)
    kinds = trace.by_kind(token_kinds(session.tokenizer, ids))
    written = len(ids) - window - sinks
    memory = session.model.ahn_config.memory
    files = _figures(trace, kinds, f"{memory} reads {name}: 1 text, {len(ids):,} tokens", out)
    layers = _layers(trace)
    if as_json:
        head = {"memory": memory, "text": name, "tokens": len(ids), "written": written}
        rows = {"layers": layers, "kinds": [dataclasses.asdict(entry) for entry in kinds]}
        common.print_json(head | rows | {"figures": files})
        return
    common.out.print(f"{memory} reads {len(ids):,} tokens of {name}; {written:,} of them left the window.")
    common.print_tables(_layer_table(layers, window), _kind_table(kinds, written))
    common.out.print(f"Wrote {', '.join(files)}.")


def _longest_module() -> tuple[str, str]:
    """File name and source, of those that the shipped model was not trained on."""
    from ahn.tiny.corpus import held_out_text

    name, source = max(held_out_text(), key=lambda entry: len(entry[1]))
    return f"{name}.py", source


def _layers(trace: Trace) -> list[dict[str, Any]]:
    """A line of the first table for each layer, as JSON types."""
    reads = trace.reads
    rows = []
    for layer, w in trace.writes.items():
        lives = [None if life == float("inf") else life for life in w.half_life().tolist()]
        means = {"strength": float(w.strength.mean()), "update": float(w.update.mean())}
        end = {"state_norm": float(w.state_norm[0, :, -1].mean()), "half_lives": lives}
        given = {"read_share": reads[layer].share, "read_cosine": float(reads[layer].cosine.mean())}
        rows.append({"layer": layer} | means | end | given)
    return rows


def _layer_table(layers: list[dict[str, Any]], window: int) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    headings = ("layer", "write\nstrength", "update", "state\nat the end", "heads that\nremember")
    for heading in (*headings, "read, of exact\nattention", "cosine\nto it"):
        table.add_column(heading, justify="right")
    for row in layers:
        lasting = sum(life is None or life > window for life in row["half_lives"])
        table.add_row(
            str(row["layer"]), f"{row['strength']:.2f}", f"{row['update']:.2f}", f"{row['state_norm']:.1f}",
            f"{lasting} of {len(row['half_lives'])}", f"{100 * row['read_share']:.1f}%", f"{row['read_cosine']:+.2f}",
        )  # fmt: skip
    return table


def _kind_table(kinds: list[KindWrites], written: int) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("kind of token")
    for heading in ("of the text", "write strength\n(95% interval)", "update, of the mean\n(95% interval)"):
        table.add_column(heading, justify="right")
    for entry in kinds:
        share = f"{100 * entry.tokens / written:.1f}%"
        table.add_row(entry.kind, share, _interval(entry.strength, 3), _interval(entry.update, 2))
    return table


def _interval(mean: Mean, digits: int) -> str:
    interval = "" if math.isnan(mean.low) else f" ({mean.low:.{digits}f}-{mean.high:.{digits}f})"
    return f"{mean.value:.{digits}f}{interval}"


def _figures(trace: Trace, kinds: list[KindWrites], title: str, out: Path) -> list[str]:
    from ahn.inspect import kind_figure, read_figure, state_figure, strength_figure
    from ahn.measure import plots

    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "strength": strength_figure(trace, title),
        "states": state_figure(trace, title),
        "reads": read_figure(trace, title),
        "kinds": kind_figure(kinds, title),
    }
    for name, figure in figures.items():
        plots.save(figure, out / f"{name}.png")
    return [str(out / f"{name}.png") for name in figures]

"""`ahn demo --model smollm2`: a chat model that people use reads a book, farther than it was trained for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ahn.cli import common
from ahn.errors import AHNError, installed_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ahn.demo.book import BookResult

WINDOW, SINKS = 480, 32
QUANTIZED = 7680
"""Tokens of the tier: with sinks and window as many as the model was trained on."""
LENGTH = 14_336
"""Tokens of the book: as far beyond the trained length as two CPU cores read in minutes, and sinks are seen to fail."""
BIN = 1024
SHOWN = 2048
"""Tokens per column of the table."""
QUESTIONS, PAGES = 4, 1024
BOOK = "moby-dick"


def read_a_book(
    adapters: list[str],
    text: str | None,
    reach: tuple[int, int],
    quantized: int,
    length: int | None,
    out: Path,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Read, ask, print a table, write results.json and figure.png.

    Args:
        adapters: directories or names of memories; none takes the first of those that ship.
        reach: window and sinks.
        quantized: tokens before the window that one more row sees at a few bits; 0 for no such row.
    """
    from ahn import smollm2
    from ahn.checkpoint import shipped
    from ahn.checkpoint.loading import ModelSource
    from ahn.config import AHNConfig
    from ahn.demo.book import DEPTH, book_figure, make_questions, read_book
    from ahn.demo.methods import FULL, WINDOW_ONLY
    from ahn.measure.method import Method
    from ahn.measure.tokens import token_ids

    length = (length or LENGTH) // BIN * BIN
    if length < 2 * BIN:
        raise AHNError(f"--length must be at least {2 * BIN:,}.")
    name, book = _book(text)
    model, tokenizer = ModelSource.open(shipped.resolve("smollm2")).load_ready(device, dtype, memory=False)
    ids = token_ids(tokenizer, book, special=False)
    if len(ids) < max(length, QUESTIONS * PAGES):
        raise AHNError(f"{name} has {len(ids):,} tokens; a text of {max(length, QUESTIONS * PAGES):,} is needed.")
    window, sinks = reach
    plain = AHNConfig(memory="window_only", window=window, sinks=sinks)
    methods = [Method(FULL), Method(WINDOW_ONLY, plain)]
    if quantized:
        tier = plain.replace(quantized=quantized)
        methods.append(Method(f"{quantized:,} at {tier.tier_label}", tier))
    for adapter in adapters or smollm2.adapters()[:1]:
        methods.append(_memory(str(shipped.resolve_adapter("smollm2", adapter)), window, sinks))
    questions = make_questions(tokenizer, book, QUESTIONS, PAGES)
    trained = model.config.max_position_embeddings
    if not as_json:
        common.out.print(
            f"\nSmolLM2-135M-Instruct reads {length:,} tokens of {name}; it was trained on {trained:,}. "
            f"Sinks + window see {sinks} + {window} tokens exactly. Afterwards it is asked in {QUESTIONS} chats for a "
            f"number that stands about {round((1 - DEPTH) * PAGES):,} tokens before the question.\n"
        )
    total = length + sum(len(question.ids) + len(question.answer) - 1 for question in questions)
    with common.progress() as bar:
        tasks = {method.name: bar.add_task(method.name, total=total) for method in methods}
        results = read_book(model, methods, ids[:length], questions, BIN, lambda n, t: bar.advance(tasks[n], t))
    data: dict[str, Any] = {"model": "smollm2", "text": name, "window": window, "sinks": sinks, "quantized": quantized}
    data |= {"bin": BIN, "length": length, "trained_positions": trained, "pages": PAGES}
    data["results"] = [dataclasses.asdict(result) for result in results]
    write_files(out, data, book_figure(results, BIN, trained, f"SmolLM2-135M-Instruct reads {name}"))
    if as_json:
        common.print_json(data)
        return
    common.print_tables(_table(results))
    common.out.print(f"\nWrote {out}/figure.png and results.json.")


def write_files(out: Path, data: dict[str, Any], figure: Figure) -> None:
    """Write results.json, with versions, which the data get here, and figure.png."""
    from ahn.files import write_json
    from ahn.measure import plots

    data["versions"] = {name: installed_version(name) for name in ("ahn", "torch", "transformers", "tokenizers")}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", data)
    plots.save(figure, out / "figure.png")


def _book(text: str | None) -> tuple[str, str]:
    """Name and text: what was named, else Moby Dick, else Python's standard library."""
    from ahn.measure.texts import STDLIB, read_text

    if text is not None:
        return Path(text).name, read_text(text)
    try:
        return "Moby Dick", read_text(BOOK)
    except AHNError as error:
        common.err.print(f"{error} Reading Python's standard library instead.", markup=False)
        return "Python's standard library", read_text(STDLIB)


def _memory(adapter: str, window: int, sinks: int) -> Any:
    from ahn.checkpoint.directory import Checkpoint
    from ahn.checkpoint.format import read_settings
    from ahn.checkpoint.hub import local_directory
    from ahn.measure.method import Method

    settings = read_settings(Checkpoint.open(local_directory(adapter)).require("adapter"))
    return Method(settings.memory, settings.replace(window=window, sinks=sinks), adapter)


def _table(results: list[BookResult]) -> Table:
    """Perplexity of every `SHOWN` tokens, cache at the end, and what was answered."""
    from statistics import geometric_mean

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("perplexity\nup to token")
    step = SHOWN // BIN
    for end in range(SHOWN, len(results[0].perplexity) * BIN + 1, SHOWN):
        table.add_column(f"\n{end // 1024}k", justify="right", no_wrap=True)
    for heading in ("cache\nMiB", "numbers\nfound", "tokens\n/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        parts = [result.perplexity[n : n + step] for n in range(0, len(result.perplexity) // step * step, step)]
        tokens = len(result.perplexity) * BIN
        table.add_row(
            result.name,
            *(f"{geometric_mean(part):,.0f}" for part in parts),
            f"{result.cache_bytes[-1] / 2**20:.0f}",
            f"{result.found}/{result.asked}",
            f"{tokens / result.seconds:,.0f}",
        )
    return table

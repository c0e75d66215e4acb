"""`ahn demo`: see a memory work on real text."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ahn.cli import common
from ahn.cli.generate import read_text
from ahn.cli.terminal import visible
from ahn.files import check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ahn.demo import Comparison, Document, Method

TINY = "ahn-tiny"
WINDOW, SINKS = 224, 32
BEST = "routed_deltanet"
"""The shipped memory that comes first, and behind quantized tokens."""
QUANTIZED_WINDOWS = 3.5
"""Quantized tokens in multiples of the window, when none are asked for."""
LONGER = 16
"""Length of a document in multiples of sinks + window, when none is asked for."""
DOCUMENTS = 3
NAMED = 6
"""Documents that are named."""
NEW_TOKENS = 80
TAIL = 40
"""Tokens that are shown of what was read last."""
WRITTEN = "bold green"


@dataclasses.dataclass(frozen=True)
class DemoSubject:
    """What is demonstrated: a bare base model, the ways to read, and the texts."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: list[Method]
    documents: list[Document]
    no_facts: str | None
    """Why there are no facts in the documents, if there are none."""


def command(
    model: common.ModelOption = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "--ahn-path", help="Adapter for the model; may be given more than once."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Read this file instead of the standard library (smollm2: Moby Dick).")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help=f"Last tokens kept exactly (default: {WINDOW}; smollm2: 480).")
    ] = None,
    sinks: Annotated[int, typer.Option("--sinks", min=0, help="First tokens kept exactly.")] = SINKS,
    quantized: Annotated[
        int | None,
        typer.Option(
            "--quantized",
            min=0,
            help="Tokens before the window that two more rows see at a few bits per number "
            f"(default: {QUANTIZED_WINDOWS:g} windows; smollm2: 7680, one row; 0: no such rows).",
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help=f"Tokens per document (default: {LONGER} · (sinks + window)).")
    ] = None,
    documents: Annotated[int, typer.Option("--documents", min=1, help="Documents to read.")] = DOCUMENTS,
    out: Annotated[Path, typer.Option("--out", help="Directory for results.json and figure.png.")] = Path("ahn-demo"),
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """See a memory work: real text far beyond the window, on this machine.

    A small model that comes with ahn reads sources of Python's standard
    library that it was not trained on. With full attention it sees all of a
    document; with sinks + window, the first and the last few tokens; with a
    memory, those and a state of fixed size; with a few bits, also the tokens
    just before the window, coarsely, without and with a memory behind them.
    The table shows what each is worth on the text beyond the window, and
    what it costs. At the end the memory with the lowest loss writes on,
    from a fact out of its window's reach if it recalled one.

    With --model and --adapter, the same with a model of your own. With
    --model smollm2, a chat model reads a book, farther than it was
    trained for, and is asked for facts in it.

    \b
    Examples:
      ahn demo
      ahn demo --length 8192 --documents 2
      ahn demo --model smollm2
      ahn demo --model BASE --adapter AHN --text book.txt --window 2016
    """
    from ahn import smollm2
    from ahn.checkpoint import shipped
    from ahn.cli import demo_book
    from ahn.demo import compare
    from ahn.demo.figure import comparison_figure

    check_folder(out)
    if model is not None and shipped.known(model) is smollm2:
        reach, book = (window or demo_book.WINDOW, sinks), None if text is None else str(text)
        common.refuse_useless("where one book is read", documents=documents != DOCUMENTS)
        tier = demo_book.QUANTIZED if quantized is None else quantized
        demo_book.read_a_book(adapter or [], book, reach, tier, length, out, device, dtype, as_json)
        return
    if model is not None:
        model = TINY if shipped.known(model) else model
    window = window or WINDOW
    start = time.perf_counter()
    tier = round(QUANTIZED_WINDOWS * window) if quantized is None else quantized
    subject = _subject(model, adapter or [], text, (window, sinks), tier, length, documents, device, dtype)
    if not as_json:
        _introduce(subject)
    total = sum(len(document.text.ids) for document in subject.documents)
    with common.progress() as bar:
        tasks = {method.name: bar.add_task(method.name, total=total) for method in subject.methods}
        comparison = compare(
            subject.model, subject.methods, subject.documents, lambda name, tokens: bar.advance(tasks[name], tokens)
        )
    if not as_json:
        common.print_tables(_table(comparison))
        common.out.print(*_notes(subject, comparison), sep="\n", style="dim")
    continuation = _write_on(subject, comparison, show=not as_json)
    data = {"model": subject.name, **comparison.as_data(), "no_facts": subject.no_facts, "continuation": continuation}
    data["seconds"] = round(time.perf_counter() - start, 1)
    title = f"{subject.name} reads {'the standard library' if text is None else text.name}"
    demo_book.write_files(out, data, comparison_figure(comparison, title))
    if as_json:
        common.print_json(data)
    else:
        common.out.print(f"{data['seconds']:.0f} s in all. Wrote {out}/figure.png and results.json.")


def _subject(
    model: str | None,
    adapters: list[str],
    text: Path | None,
    reach: tuple[int, int],
    quantized: int,
    length: int | None,
    documents: int,
    device: str | None,
    dtype: str | None,
) -> DemoSubject:
    """Load everything, so that what is wrong with it is said before the measuring starts."""
    from ahn import tiny
    from ahn.checkpoint import shipped
    from ahn.cli.session import TINY_DEVICE, open_session
    from ahn.demo import make_documents, make_methods
    from ahn.tiny.corpus import held_out_text

    name = model or (adapters[0] if adapters else TINY)
    if name == TINY:
        memories = adapters or sorted(tiny.adapters(), key=lambda memory: memory != BEST)
        model, adapters = str(tiny.path()), [str(shipped.resolve_adapter("tiny", memory)) for memory in memories]
        device = device or TINY_DEVICE
    texts = held_out_text() if text is None else [(text.name, read_text(text))]
    window, sinks = reach
    first = adapters[0] if adapters else None
    session = open_session(model, first, device, dtype, window=window, sinks=sinks, quantized=0)
    lossless = sum(reach)
    with common.progress() as bar:
        bar.add_task("tokenising", total=None)
        made, no_facts = make_documents(session.tokenizer, texts, documents, length or LONGER * lossless, lossless)
    methods = make_methods(session.model, adapters[1:], quantized)
    return DemoSubject(name, session.model, session.tokenizer, methods, made, no_facts)


def _introduce(subject: DemoSubject) -> None:
    config = subject.methods[-1].config
    assert config is not None
    parameters = sum(p.numel() for p in subject.model.parameters())
    length = len(subject.documents[0].text.ids)
    names = ", ".join(document.name for document in subject.documents[:NAMED])
    if len(subject.documents) > NAMED:
        names += f" and {len(subject.documents) - NAMED:,} more"
    count = "1 document" if len(subject.documents) == 1 else f"{len(subject.documents):,} documents"
    unseen = " that it was not trained on" if subject.name == TINY else ""
    said = (
        f" ({parameters / 1e6:,.1f} M parameters, frozen) reads "
        f"{count} of {length:,} tokens{unseen}: {names}. {config.sinks} sinks and a "
        f"window of {config.window} cover 1/{length / config.lossless:.0f} of each.\n"
    )
    common.out.print(Text.assemble("\n", (visible(subject.name), "bold"), visible(said)))


def _table(comparison: Comparison) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("\n")
    headings = ("perplexity\npast window", "gap won\nback", "facts recalled\n(95% interval)")
    for heading in (*headings, "cache\nMiB", "peak\nMiB", "tokens/s\n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in comparison.results:
        facts = "-"
        if result.facts_interval:
            low, high = result.facts_interval
            facts = f"{result.facts_recalled / result.facts_asked:.0%} ({100 * low:.0f}-{100 * high:.0f})"
        table.add_row(
            result.name,
            f"{result.perplexity:.2f}",
            "-" if result.gap_won_back is None else f"{result.gap_won_back:.0%}",
            facts,
            f"{result.cache_bytes / 2**20:.1f}",
            "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}",
            f"{result.tokens_per_second:,.0f}",
            style="bold" if result.name == comparison.best_memory.name else None,
        )
    return table


def _notes(subject: DemoSubject, comparison: Comparison) -> list[str]:
    """What the columns mean, for somebody who sees them for the first time."""
    first = comparison.results[0]
    facts = f"{first.facts_asked} facts, each stated before the window when it is asked for."
    if not first.facts_asked:
        facts = f"No facts: {subject.no_facts or 'the documents are too short for them.'}"
    peak = "Peak: memory that reading took, on top of the model."
    if first.peak_bytes is None:
        peak = "Peak memory cannot be measured on this platform."
    coarse = comparison.quantized
    bits = comparison.bits.capitalize()
    few = [f"{bits}: also the {coarse:,} tokens before the window, at so many bits per number of keys and values."]
    reach = comparison.window + comparison.sinks + coarse
    if comparison.length <= reach:
        few.append(
            f"No document is longer than the {reach:,} tokens that these see: the memory behind {comparison.bits} got "
            f"nothing, and is seen at work with --length {2 * reach} or so."
        )
    return [
        f"Perplexity of {comparison.tokens_compared:,} tokens. Of the gap, 0% is sinks + window, 100% full attention.",
        f"{facts} Cache: at the end of a document. {peak}",
        *(few if coarse else []),
    ]


def _write_on(subject: DemoSubject, comparison: Comparison, show: bool) -> dict[str, Any]:
    """Let the best memory write on after a long text, from the answer to a fact on if it recalled one that was lost."""
    from ahn.cli.session import Session
    from ahn.cli.writing import Sampling

    best = next(method for method in subject.methods if method.name == comparison.best_memory.name)
    recall = comparison.longest_recall(best.name)
    document = recall.document if recall else subject.documents[0]
    ids = document.text.ids[: recall.fact.answer] if recall else document.text.ids

    def show_text(text: str, style: str = WRITTEN) -> None:
        if show:
            common.out.print(text, end="", style=style, markup=False, soft_wrap=True)

    with best.on(subject.model):
        session = Session(subject.model, subject.tokenizer)
        session.read(ids)
        if show:
            common.out.print(f"\n{best.name}", style="bold", end="")
            common.out.print(f" writes on after {len(ids):,} tokens of {document.name}.")
        told: dict[str, Any] = {"method": best.name, "document": document.name, "tokens_read": len(ids)}
        if show and recall:
            _explain(subject, recall.fact, recall.guesses)
        show_text("\n" + subject.tokenizer.decode(ids[-TAIL:]).partition("\n")[2], "dim")
        if recall:
            told |= {"fact": dataclasses.asdict(recall.fact), "answer": session.write(Sampling(1, 0.0), show_text)}
            # the line is closed for the model: facts were put between lines of text, their ends follow from nothing
            show_text("\n", "dim")
            session.read(session.encode("\n", start=False))
        told["text"] = session.write(Sampling(NEW_TOKENS, 0.0), show_text)
    show_text("\n\n", "dim")
    return told


def _explain(subject: DemoSubject, fact: Any, guesses: dict[str, int]) -> None:
    from ahn.demo.methods import WINDOW_ONLY
    from ahn.tiny.facts import STATEMENT

    line = STATEMENT.format(key=fact.key, value=fact.value).strip()
    lost = subject.tokenizer.decode([guesses[WINDOW_ONLY]]).strip()
    common.out.print(
        f"{fact.distance:,} tokens earlier, far out of the window's sight, the text says “{line}”. "
        f"Sinks + window alone would answer “{lost}”."
    )

"""`ahn eval`: benchmarks. `ahn eval TASK…` runs tasks; measurements, `list` and `report` are verbs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer
from rich.table import Table
from typer.core import TyperGroup

from ahn.cli import common
from ahn.cli.groups import GroupedCommand
from ahn.config import Reach
from ahn.evaluation.runner import Watcher
from ahn.files import check_folder

if TYPE_CHECKING:
    from ahn.evaluation.documents import LongDocument
    from ahn.evaluation.methods import Evaluated
    from ahn.evaluation.task import Task


MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        help="ahn, or a baseline with as many keys: window, ct-max, ct-avg; or full, which sees all.",
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="Text file, or JSON lines with a field text (default: code from Python's library)."),
]
BookOption = Annotated[int, typer.Option("--book", min=0, help="Number of the text in JSON lines.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of the results.")]


class RunUnlessNamed(TyperGroup):
    """A group whose verb `run` may be left out: `ahn eval longbench` is `ahn eval run longbench`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunUnlessNamed, add_completion=False, no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Run benchmarks and compare results. `ahn eval TASK…` is short for `ahn eval run TASK…`."""


@app.command("run", cls=GroupedCommand)
def run(
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK…",
            help="A benchmark, a task or one length of it: longbench, longbench/qmsum, lveval/128k, "
            "lveval/cmrc_mixup/16k, infinitebench/en_qa, ruler/vt, needle (all: ahn eval list).",
        ),
    ],
    model: common.ModelOption = None,
    adapter: common.AdapterOption = None,
    method: MethodOption = "ahn",
    window: common.WindowOption = None,
    sinks: common.SinksOption = None,
    quantized: common.QuantizedOption = None,
    profile: Annotated[
        str, typer.Option("--profile", help="official (the benchmark's protocol) or paper (that of the AHN paper).")
    ] = "official",
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Local data under the Hub's file names; no network then.")
    ] = None,
    protocol_dir: Annotated[
        Path | None, typer.Option("--protocol-dir", help="Local protocols (prompts, stop words); no network then.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Longest prompt in tokens (default: the profile's).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First samples of each task only.")] = None,
    out: OutOption = Path("results"),
    haystack: Annotated[
        Path | None, typer.Option("--haystack", help="Text to hide things in, for ruler, recall and needle.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens of a prompt of generated tasks; repeatable.")
    ] = None,
    depth: Annotated[
        list[float] | None, typer.Option("--depth", min=0, max=100, help="Depth of a needle in percent; repeatable.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Samples for each length and depth of generated tasks.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of generated tasks.")] = 0,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, help="Prompts that are answered together where they share no text."),
    ] = 1,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Run tasks with a model.

    Each task and configuration has its own folder in --out. After a run that
    was interrupted the same command goes on from there; what is finished is
    not repeated. Start it on several GPUs with

    \b
      accelerate launch $(which ahn) eval TASK… --model …
    """
    from ahn.evaluation import runner
    from ahn.evaluation.results import averages
    from ahn.evaluation.task import Options
    from ahn.evaluation.tasks import check, without_use
    from ahn.evaluation.tasks import tasks as find
    from ahn.evaluation.tasks.haystack import read as read_haystack
    from ahn.evaluation.workers import Worker

    worker = Worker.from_environment()
    options: dict[str, Any] = {
        "profile": profile,
        "data_dir": data_dir,
        "protocol_dir": protocol_dir,
        "max_length": max_length,
    }
    options |= {"haystack": haystack, "lengths": tuple(length or ()), "depths": tuple(depth or ()), "samples": samples}
    Options(**options, seed=seed)  # mistakes show before the model is loaded
    for spec in tasks:
        check(spec)
    useless = without_use(tasks)
    typed = {"lengths": "length", "depths": "depth"}
    given = {typed.get(name, name): value for name, value in (options | {"seed": seed}).items() if name in useless}
    common.refuse_useless("for " + ", ".join(tasks), **given)
    if haystack is not None:
        read_haystack(haystack)
    check_folder(out)
    evaluated = _load(
        method, model, adapter, device or worker.device(), dtype, window=window, sinks=sinks, quantized=quantized
    )
    found = [task for spec in tasks for task in find(spec, **options, seed=seed, tokenizer=evaluated.tokenizer)]
    with common.progress() as bar:
        watcher = Bars(bar) if worker.first else Watcher()
        named = {task.name: task for task in found}
        results = runner.run(list(named.values()), evaluated, out, limit, worker, watcher, batch)
    if not worker.first:
        return
    if as_json:
        common.print_json({"results": results, "averages": averages(results)})
    else:
        common.print_tables(_table(results, averages(results)))
        common.err.print(f"Results are in {out}")


@app.command("perplexity", cls=GroupedCommand)
def perplexity(
    model: common.ModelOption = None,
    adapter: common.AdapterOption = None,
    method: MethodOption = "ahn",
    window: common.WindowOption = None,
    sinks: common.SinksOption = None,
    quantized: common.QuantizedOption = None,
    text: TextOption = None,
    book: BookOption = 0,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens to read (default: all).")] = None,
    out: OutOption = Path("results"),
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Measure the perplexity of a long document by position, with the memory that it takes."""
    from ahn.evaluation import perplexity as measured

    document = _read(text, book, out)
    evaluated = _load(method, model, adapter, device, dtype, window=window, sinks=sinks, quantized=quantized)
    tokens = _tokenised(evaluated, document, length)
    with common.progress() as bar:
        reading = bar.add_task("reading", total=len(tokens.ids))
        result = measured.run(evaluated, tokens, out, advance=lambda read: bar.advance(reading, read))
    _print_figures(result, out, as_json)


@app.command("gradients", cls=GroupedCommand)
def gradients(
    model: common.ModelOption = None,
    adapter: common.AdapterOption = None,
    method: MethodOption = "ahn",
    window: common.WindowOption = None,
    sinks: common.SinksOption = None,
    text: TextOption = None,
    book: BookOption = 0,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of the text, from its beginning.")] = 1024,
    answer: Annotated[int, typer.Option("--answer", min=1, help="Tokens at its end whose loss counts.")] = 64,
    loss: Annotated[str, typer.Option("--loss", help="kl, ce, distill or a sum of them.")] = "kl",
    out: OutOption = Path("results"),
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Find out which forgotten tokens matter: gradients of the distillation loss, which `report` draws on the text."""
    from ahn.evaluation import gradient_probe
    from ahn.training.losses import parse_loss

    parse_loss(loss)
    document = _read(text, book, out)
    evaluated = _load(method, model, adapter, device, dtype, window=window, sinks=sinks, quantized=0)
    tokens = _tokenised(evaluated, document, length)
    _print_figures(gradient_probe.run(evaluated, tokens, out, answer, loss), out, as_json)


@app.command("list", cls=GroupedCommand)
def list_tasks(as_json: common.JsonOption = False) -> None:
    """Print the name of every task."""
    from ahn.evaluation.tasks import names

    found = names()
    if as_json:
        common.print_json(found)
    else:
        typer.echo("\n".join(found))


@app.command("report", cls=GroupedCommand)
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Result folders, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("report"),
) -> None:
    """Compare results: tables with the published numbers beside, heat maps and curves, as text, CSV, PNG and HTML."""
    from ahn.evaluation.report import write_report

    write_report(folders, out)
    common.err.print(f"The report is in {out}")


class Bars(Watcher):
    """Progress of a run as two bars: samples, and tokens of the prompt that is being read."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.samples, self.tokens = bar.add_task("", total=None), bar.add_task("reading", total=None)

    def started(self, task: Task, samples: int, done: int) -> None:
        self.bar.reset(self.samples, description=task.name, total=samples, completed=done)

    def read(self, tokens: int, total: int) -> None:
        self.bar.update(self.tokens, completed=tokens, total=total)

    def answered(self) -> None:
        self.bar.advance(self.samples)

    def waiting(self) -> None:
        self.bar.update(self.tokens, description="waiting for the other processes")


def _load(
    method: str, model: str | None, adapter: str | None, device: str | None, dtype: str | None, **reach: Unpack[Reach]
) -> Evaluated:
    """What was named; the model that comes with ahn if nothing was, and an adapter with its base if only that was."""
    from ahn.cli.session import named_or_shipped
    from ahn.evaluation import methods

    model, adapter, device = named_or_shipped(model, adapter, device)
    return methods.load(method, model, adapter, device, dtype, **reach)


def _read(text: Path | None, book: int, out: Path) -> tuple[str, str]:
    """A document's name and text, once it is known that results can be written: both before a model is loaded."""
    from ahn.evaluation import documents

    check_folder(out)
    return documents.read(text, book)


def _tokenised(evaluated: Evaluated, document: tuple[str, str], length: int | None) -> LongDocument:
    from ahn.evaluation import documents

    with common.progress() as bar:
        bar.add_task("tokenising", total=None)
        return documents.tokenised(evaluated.tokenizer, document, length)


def _print_figures(result: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        common.print_json(result)
    else:
        common.print_pairs((name, str(value)) for name, value in result.items() if value is not None)
        common.err.print(f"Results are in {out}")


def _table(results: list[dict[str, Any]], means: dict[str, float]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold")
    for heading in ("profile", "method"):
        table.add_column(heading)
    tier = ["quantized"] if any(result.get("quantized") for result in results) else []
    for heading in ("window", "sinks", *tier, "samples", "score"):
        table.add_column(heading, justify="right")
    for result in results:
        seen = ["" if result.get(name) is None else f"{result[name]:,}" for name in ("window", "sinks", *tier)]
        numbers = [*seen, f"{result['samples']:,}", f"{result['score']:.2f}"]
        table.add_row(result["task"], result["profile"], result["method"], *numbers)
    for name, mean in means.items():
        table.add_row(f"mean of {name}", *[""] * (5 + len(tier)), f"{mean:.2f}")
    return table

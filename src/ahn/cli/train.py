"""`ahn train`: distil a memory onto a model, on one machine or many."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ahn.cli import common
from ahn.errors import AHNError, install_command

if TYPE_CHECKING:
    from transformers import TrainerCallback

app = typer.Typer(add_completion=False)

DISTILLED = {"kl": "KL", "ce": "cross entropy", "teacher_ce": "full attention", "gap": "gap"}
SCORED = {"loss": "cross entropy of scores", "recall": "found of the tokens looked at most"}
"""What the table at the end shows of a run's held-out metrics, by what it learned from."""
GROUPS = {
    "model_name_or_path": "Model and memory",
    "dataset": "Data",
    "loss_type": "Loss and windows",
    "save_ahn_only": "Output",
}
"""Headings in the list of flags, by the first flag below each."""
ABOUT = (
    "Distil a memory onto a frozen model: it learns to give what the same model gives with full attention. A flag wins "
    "over the file."
)
EXAMPLES = """ahn train configs/debug.yaml --output_dir out
torchrun --nproc_per_node 8 --no-python ahn train CONFIG.yaml"""
"""The second one is for several GPUs or machines."""
OTHER_FLAGS = (
    "Also every flag of transformers.TrainingArguments: --output_dir, --learning_rate, --num_train_epochs, "
    "--max_steps, --per_device_train_batch_size, --gradient_accumulation_steps, --bf16, --activation_checkpointing, "
    "--save_steps, --resume_from_checkpoint true, --eval_strategy, --logging_steps, --report_to, --seed, … "
    "docs/training.md explains them, the data formats and what the log says."
)


@app.command(
    "train", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def command(
    ctx: typer.Context,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [--FLAG VALUE]…")] = None,
) -> None:
    """Train a memory for a model."""
    words = arguments or []
    if not words or {"--help", "-h"} & set(words):
        _help(ctx)
        return
    try:
        from ahn.training.arguments import parse
        from ahn.training.run import run
    except ImportError as error:
        raise AHNError(f"ahn train needs more packages (no {error.name}): {install_command('train')}.") from error
    if not common.err.is_terminal:
        words = [*words, *_no_bars(words)]
    with _messages():
        chosen = parse(words)
        results = run(chosen, [] if common.err.is_terminal else [_step_lines()])
    if chosen.trainer.process_index == 0:
        _summary(results, str(chosen.trainer.output_dir))


def _no_bars(words: list[str]) -> list[str]:
    """Turn off the bars of other libraries, which fill a log; returns the flag that does so for the Trainer's."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    asked = any(word.replace("-", "_").startswith("__disable_tqdm") for word in words)
    return [] if asked else ["--disable_tqdm", "true"]


def _step_lines() -> TrainerCallback:
    """Says every half minute which step it is, of how many."""
    from transformers import TrainerCallback

    class StepLines(TrainerCallback):
        told = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and time.monotonic() - self.told >= common.PATIENCE:
                self.told = time.monotonic()
                common.err.print(f"step {state.global_step:,} of {state.max_steps:,}")

    return StepLines()


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    log, console = logging.getLogger("ahn"), _Console()
    level = log.level
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # that it tries again; what it fails with is an error
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # likewise
    log.addHandler(console)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(console)
        log.setLevel(level)


class _Console(logging.Handler):
    """The package's messages on standard error, from the first process: all of them have the same to say."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            common.err.print(record.getMessage(), markup=False)


def _summary(results: dict[str, Any], output: str) -> None:
    typer.echo(f"{results['steps']:,} steps; adapter in {output}")
    before, after = results["before"], results["after"]
    if after is None:
        return
    table = Table(box=None, padding=(0, 2))
    scored = "eval_recall" in after
    columns = SCORED if scored else DISTILLED
    table.add_column("held-out data, nats per token", justify="left")
    for name in columns.values():
        table.add_column(name, justify="right")
    for name, found in (("untrained" if scored else "sinks + window", before), ("with the memory", after)):
        if found is not None:
            table.add_row(name, *(f"{found[f'eval_{key}']:.4f}" for key in columns))
    common.print_tables(table)


def _help(ctx: typer.Context) -> None:
    import dataclasses

    from ahn.training.settings import Settings

    groups: dict[str, list[tuple[str, str]]] = {}
    for field in dataclasses.fields(Settings):
        if field.init:
            heading = GROUPS.get(field.name) or next(reversed(groups))
            told = field.metadata["help"] + ("" if field.default in (None, False) else f" [{field.default}]")
            groups.setdefault(heading, []).append((f"--{field.name}", told))
    shown = ctx.make_formatter()
    shown.write_usage("ahn train", "[CONFIG.yaml] [--FLAG VALUE]…")
    shown.write_paragraph()
    shown.write_text(ABOUT)
    with shown.section("Examples"):
        shown.write_text("\b\n" + EXAMPLES)
    for heading, flags in groups.items():
        with shown.section(heading):
            shown.write_dl(flags)
    shown.write_paragraph()
    shown.write_text(OTHER_FLAGS)
    typer.echo(shown.getvalue().rstrip("\n"))

"""`ahn bench`: speed and memory, side by side, against what the machine can do."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import common
from ahn.config import DTYPES
from ahn.errors import AHNError
from ahn.files import check_folder

if TYPE_CHECKING:
    from ahn.bench.runner import Plan
    from ahn.config import AHNConfig
    from ahn.measure.method import Method

TINY_WINDOW, TINY_SINKS = 224, 32
TRAINED_TOTAL = 8192
"""Largest lossless total of the paper's training."""
LENGTHS, TINY_LENGTHS = (1, 4, 32), (1, 4, 16)
"""Contexts when none are asked for, in multiples of sinks + window."""
BATCHES, TINY_BATCHES = (1, 4, 16, 32, 64, 100), (1, 4, 16)
"""Conversations of `throughput` when none are asked for."""
NEW_TOKENS, BUDGET = {"cpu": 8}, {"cpu": 2.0}
"""Steps in a repetition, and seconds after which a row is not repeated again; elsewhere `BenchSettings`' own."""
MAX_SECONDS = 120.0
USED = {
    "new_tokens": {"decode", "memory", "throughput"}, "real_prefill": {"decode", "throughput"},
    "profile": {"prefill", "decode", "train"}, "no_activation_checkpointing": {"train"},
}  # fmt: skip
"""Options that are for some measurements alone, and these."""
UNITS = {"k": 1 << 10, "m": 1 << 20}
LARGEST = 10**12
"""The largest number that is measured with, far beyond what a machine can hold."""


class Measurement(str, Enum):  # noqa: UP042  (typer shows the values of this kind as choices)
    prefill = "prefill"
    decode = "decode"
    memory = "memory"
    throughput = "throughput"
    train = "train"
    report = "report"


def command(
    measurements: Annotated[
        list[Measurement], typer.Argument(help="One or more, in this order; report only draws --out again.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Shape by name (qwen2.5-3b, qwen2.5-7b, qwen2.5-14b, qwen3-4b), tiny (comes with ahn), smollm2, a "
            "config.json, or a model's directory or Hub id.",
        ),
    ] = "tiny",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Take only the shape of a directory or Hub id.")
    ] = False,
    adapter: common.AdapterOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Of full-dynamic, full-static, window and the memories (gated_deltanet, …), with commas between "
            "(default: all; for train, the memories).",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            min=1,
            help="Last tokens kept exactly (default: the adapter's, else 32640, or less if the base was trained on "
            "less; tiny: 224; train: at most 8192 with the sinks).",
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            "--sinks", min=0, help="First tokens kept exactly (default: the adapter's, else 128, or less; tiny: 32)."
        ),
    ] = None,
    quantized: common.QuantizedOption = None,
    bits: Annotated[
        str | None, typer.Option("--bits", help="Of quantized tokens, per number of keys and of values (default: 4/2).")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", help="Lengths like 32k,128k,1M (default: 1, 4 and 32 times sinks + window)."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Conversations at once, like 1,8 (default: 1; throughput: up to 100).")
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option("--new-tokens", min=2, help="Steps in each repetition of a decode measurement (64; on a CPU 8)."),
    ] = None,
    real_prefill: Annotated[
        bool, typer.Option("--real-prefill", help="Decode after really reading the context, not from random caches.")
    ] = False,
    max_seconds: Annotated[
        float,
        typer.Option("--max-seconds", min=0, help="Skip what takes longer even at the machine's limit."),
    ] = MAX_SECONDS,
    profile: Annotated[
        bool, typer.Option("--profile", help="For prefill, decode, train: also write every kernel's time to --out.")
    ] = False,
    activation_checkpointing: Annotated[
        bool,
        typer.Option(
            "--activation-checkpointing/--no-activation-checkpointing",
            help="For train: compute activations again in the backward pass, or keep them.",
        ),
    ] = True,
    out: Annotated[Path, typer.Option("--out", help="Folder for rows.jsonl, the table and the plots.")] = Path(
        "ahn-bench"
    ),
    device: common.DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help=f"{', '.join(DTYPES)} (default: float32 on a CPU, else bfloat16).")
    ] = None,
) -> None:
    """Measure speed and memory, side by side, against what the machine can do.

    Full attention (transformers' dynamic and static cache), sinks + window and
    each memory, on one model. The machine's copy bandwidth and matmul rate are
    measured first; every row says how close to them it comes. Rows are
    appended to rows.jsonl in --out as they are measured, and the table and
    plots are drawn from all rows there, so one folder can be filled by several
    commands.

    \b
    Examples:
      ahn bench prefill decode memory throughput train
      ahn bench decode --model qwen2.5-3b --context 32k,128k,1M
      ahn bench throughput --model qwen2.5-3b --context 128k --batch 1,32,100
      ahn bench train --model qwen2.5-7b --methods gated_deltanet
    """
    from ahn.checkpoint import shipped

    names = list(dict.fromkeys(m.value for m in measurements if m is not Measurement.report))
    settings: dict[str, Any] = {"new_tokens": new_tokens, "real_prefill": real_prefill, "profile": profile}
    of_all = settings | {"no_activation_checkpointing": not activation_checkpointing}
    options = BenchOptions(model, adapter, methods, window, sinks, quantized, bits, context, batch)
    if not names:
        of_all |= vars(options) | {"device": device, "dtype": dtype, "random_weights": random_weights}
        of_all |= {"model": model != "tiny", "max_seconds": max_seconds != MAX_SECONDS}
        common.refuse_useless("for a report", **of_all)
    for name, measured in USED.items():
        if not measured & set(names):
            common.refuse_useless("without " + " or ".join(sorted(measured)), **{name: of_all[name]})
    if names:
        options = dataclasses.replace(options, adapter=adapter and shipped.resolve_adapter(model, adapter))
        plans = [options.plan(name) for name in names]
        if not any(_has_codes(method.config) for plan in plans for method in plan.methods):
            common.refuse_useless("where no token is kept in codes (--quantized, the memory retained)", bits=bits)
        check_folder(out)
        settings |= {"max_seconds": max_seconds, "activation_checkpointing": activation_checkpointing}
        _measure(plans, model, random_weights, settings, out, device, dtype)
    _report(out)


def _has_codes(config: AHNConfig | None) -> bool:
    from ahn import memory

    return config is not None and (config.quantized > 0 or memory.get(config.memory).keeps_tokens)


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What the plans are made of, as typed."""

    model: str
    adapter: str | None
    methods: str | None
    window: int | None
    sinks: int | None
    quantized: int | None
    bits: str | None
    context: str | None
    batch: str | None

    def plan(self, measurement: str) -> Plan:
        """What to measure. Mistakes show here, before a model is loaded."""
        from ahn.bench.runner import Plan

        chosen, lossless = self._methods(measurement)
        tiny = self.model == "tiny"
        lengths = {"throughput": (4,), "train": (3,)}.get(measurement, TINY_LENGTHS if tiny else LENGTHS)
        contexts = [n * lossless for n in lengths] if self.context is None else numbers("--context", self.context)
        usual = (1,) if measurement != "throughput" else TINY_BATCHES if tiny else BATCHES
        batches = list(usual) if self.batch is None else numbers("--batch", self.batch)
        return Plan(measurement, chosen, sorted(set(contexts)), sorted(set(batches)))

    def _methods(self, measurement: str) -> tuple[list[Method], int]:
        """What to compare, and sinks + window."""
        from ahn import memory
        from ahn.bench.methods import WINDOW, make_methods
        from ahn.bench.model import config_of
        from ahn.config import AHNConfig
        from ahn.shape import trained_length

        trained = trained_length(config_of(self.model))
        names = None if self.methods is None else [name.strip() for name in self.methods.split(",")]
        window, sinks = self.window, self.sinks
        if self.model == "tiny":
            window, sinks = window or TINY_WINDOW, TINY_SINKS if sinks is None else sinks
        quantized = self.quantized
        if measurement == "train":
            if quantized:
                raise AHNError("Memories are trained without quantized tokens: leave --quantized out of `bench train`.")
            quantized = 0
            names = names or (None if self.adapter else list(memory.recurrent()))
            usual = AHNConfig.for_base(trained)
            sinks = usual.sinks if sinks is None else sinks
            window = window or max(min(TRAINED_TOTAL, usual.lossless) - sinks, 1)
        chosen = make_methods(names, window, sinks, self.adapter, quantized, self._bits(), trained)
        (exact,) = make_methods([WINDOW], window, sinks, self.adapter, trained=trained)
        assert exact.config is not None
        if measurement == "train" and names is None:
            chosen = [method for method in chosen if method.trainable]
        return chosen, exact.config.lossless

    def _bits(self) -> tuple[int, int] | None:
        if self.bits is None:
            return None
        parts = self.bits.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise AHNError(f"--bits takes bits of keys and of values like 4/2, got {self.bits!r}.")
        return int(parts[0]), int(parts[1])


def numbers(option: str, text: str) -> list[int]:
    """A list like "32k,128k,1M"; k and M are 1024 and 1024²."""
    found = []
    for part in text.split(","):
        digits, unit = part.strip(), 1
        if digits[-1:].lower() in UNITS:
            digits, unit = digits[:-1], UNITS[digits[-1].lower()]
        if not digits.isdecimal() or len(digits) > len(str(LARGEST)) or not 1 <= int(digits) * unit <= LARGEST:
            raise AHNError(
                f"{option} takes numbers like 4096, 32k or 1M with commas between, {LARGEST:.0e} at most, got {text!r}."
            )
        found.append(int(digits) * unit)
    return found


def _measure(
    plans: list[Plan],
    model: str,
    random_weights: bool,
    given: dict[str, Any],
    out: Path,
    device: str | None,
    dtype: str | None,
) -> None:
    import torch
    import transformers

    from ahn.bench import ceilings, records, runner, table
    from ahn.bench.model import load
    from ahn.bench.profile import table as kernel_table
    from ahn.bench.stand import BenchSettings, Stand
    from ahn.checkpoint.loading import pick_device
    from ahn.cli.env import environment

    place = pick_device(device)
    chosen = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    if chosen not in DTYPES:
        raise AHNError(f"Unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}.")
    if not common.err.is_terminal:
        transformers.utils.logging.disable_progress_bar()  # of loading weights: noise in a log
    subject = load(model, random_weights, place, getattr(torch, chosen))
    given["new_tokens"] = given["new_tokens"] or NEW_TOKENS.get(place.type, BenchSettings.new_tokens)
    settings = BenchSettings(**given, budget=BUDGET.get(place.type, BenchSettings.budget))
    rates = ceilings.measure(place, getattr(torch, chosen))
    hardware = records.hardware(place)
    facts: dict[str, Any] = {
        "model": subject.name,
        "random_weights": subject.random,
        "model_config": subject.model.config.to_diff_dict(),
        "dtype": chosen,
        "hardware": hardware,
        "ceilings": dataclasses.asdict(rates),
        "settings": dataclasses.asdict(settings),
        "code": records.code(),
        "environment": environment(),
    }
    log = records.Log(out, facts)
    common.err.print(
        f"{subject.name} on {hardware['device']}, {chosen}: copy {rates.bytes_per_second / 1e12:.3f} TB/s, "
        f"matmul {rates.flops_per_second / 1e12:.2f} TFLOP/s. Rows go to {log.path}",
        soft_wrap=True,
    )
    stand = Stand(subject.model, rates, settings)
    shared = {"model": subject.name, "device": hardware["device"], "dtype": chosen}

    def say(row: dict[str, Any]) -> None:
        common.err.print(table.line(row), markup=False, soft_wrap=True)
        if "kernels" in row:
            name = "-".join(str(row[part]) for part in ("measurement", "model", "method", "context"))
            (out / f"kernels-{name}.txt").write_text(kernel_table(row["kernels"], row["seconds"]), encoding="utf-8")

    for plan in plans:
        runner.run(stand, plan, shared, log, say)


def _report(out: Path) -> None:
    """Print the tables of all rows in a folder, and write them there with the plots."""
    from ahn.bench import figures, records, table
    from ahn.files import write_text
    from ahn.measure import plots

    rows = records.read(out)
    text = table.text(rows)
    typer.echo(text, nl=False)
    write_text(out / "table.txt", text)
    for name, figure in figures.figures(rows).items():
        plots.save(figure, out / f"{name}.png")
    common.err.print(f"Rows, table and plots are in {out}")

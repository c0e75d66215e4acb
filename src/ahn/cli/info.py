"""`ahn info`: what a memory is made of and what it saves, for any model, from its configuration alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer
from rich.table import Table

from ahn.cli import common
from ahn.config import Reach
from ahn.files import expanded
from ahn.measure.plots import UNITS

if TYPE_CHECKING:
    from ahn.checkpoint.directory import Checkpoint
    from ahn.config import AHNConfig
    from ahn.costs import Cost

SHOWN = (1, 2, 4, 8, 32)
"""Lengths of the tables when none are asked for, in multiples of sinks + window."""
POINTS = 97
"""Lengths in a plot."""


def command(
    model: Annotated[str, typer.Argument(help="A model's directory, its config.json, a Hub id, tiny or smollm2.")],
    adapter: common.AdapterOption = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Kind of memory (default: the adapter's, else gated_deltanet).")
    ] = None,
    window: common.WindowOption = None,
    sinks: common.SinksOption = None,
    quantized: common.QuantizedOption = None,
    length: Annotated[
        list[int] | None,
        typer.Option("--length", min=1, max=10**12, help="Tokens of a prompt; may be given more than once."),
    ] = None,
    as_json: common.JsonOption = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write FLOPs and cache by length as a figure.")] = None,
) -> None:
    """Print shapes, memory parameters, cache and FLOPs of a model. No weights are needed.

    Of a Hub id only the configuration is downloaded.
    """
    if plot is not None:
        from ahn.measure.plots import check

        check(plot)
    subject = look_at(model, adapter, memory, window=window, sinks=sinks, quantized=quantized)
    costs = [subject.cost(n) for n in sorted(set(length or (m * subject.config.lossless for m in SHOWN)))]
    if as_json:
        common.print_json(as_data(subject, costs))
    else:
        common.print_pairs(_summary(subject))
        common.print_tables(_cache_table(costs), _flops_table(costs))
    if plot is not None:
        _plot(subject, costs, plot)
        common.err.print(f"Wrote {plot}")


@dataclasses.dataclass(frozen=True)
class ModelOverview:
    """A model and the memory it has or would have."""

    name: str
    hf_config: Any
    config: AHNConfig
    weights: tuple[Checkpoint, ...]
    """What lies on disk: of the model, then of the adapter; none of them if there is only a configuration."""

    def cost(self, length: int) -> Cost:
        from ahn.costs import cost

        return cost(self.hf_config, self.config, length)


def look_at(model: str, adapter: str | None, memory: str | None, **reach: Unpack[Reach]) -> ModelOverview:
    """Find the configuration of a model and the settings of its memory, and check the weights that lie beside them.

    Raises:
        AHNError: there is no such model or adapter, they do not belong together, no memory can be attached to such a
            model, or the weights are damaged.
    """
    from ahn.checkpoint import format as checkpoint_format
    from ahn.checkpoint import shipped
    from ahn.checkpoint.directory import Checkpoint
    from ahn.checkpoint.hub import local_directory
    from ahn.checkpoint.validate import check_tensors
    from ahn.config import PUBLISHED_NAME, SAVED_BLOCK, AHNConfig, overridden
    from ahn.costs import empty_model
    from ahn.model.adapter import attachable
    from ahn.shape import ModelShape, trained_length

    adapter = adapter and shipped.resolve_adapter(model, adapter)
    source = _open(shipped.resolve(model))
    hf_config = checkpoint_format.transformers_config(source.config, source.path)
    shape = ModelShape.from_config(hf_config)
    found = [source] if source.tensors else []
    settings = source
    if adapter is not None:
        settings = Checkpoint.open(local_directory(adapter))
        checkpoint_format.check_base(settings, hf_config, model)
        found.append(settings)
    if adapter is not None or {SAVED_BLOCK, PUBLISHED_NAME} & settings.config.keys():
        config = checkpoint_format.read_settings(settings)
        if settings.ahn_tensors:
            check_tensors(settings, shape, config)
        given = None not in (reach.get("window"), reach.get("sinks"))
        checkpoint_format.report_window(settings, overridden(config, **reach), given)
    else:
        config = AHNConfig.for_base(trained_length(hf_config))
    used = overridden(config, memory=memory, **reach)
    attachable(empty_model(hf_config), used)
    return ModelOverview(model, hf_config, used, tuple(found))


def _open(model: str) -> Checkpoint:
    """The configuration of a directory, a file or a Hub id, with the headers of its weights if they are at hand."""
    from ahn.checkpoint.directory import CONFIG, INDEX, WEIGHTS, Checkpoint
    from ahn.checkpoint.hub import config_file
    from ahn.errors import AHNError
    from ahn.files import read_json

    path = expanded(model)
    if path.is_dir():
        if (path / WEIGHTS).exists() or (path / INDEX).exists():
            return Checkpoint.open(path)
        return Checkpoint(path, read_json(path / CONFIG), {})
    if not path.is_file() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise AHNError(f"There is no file or directory {model!r}.")
    file = path if path.is_file() else config_file(model)
    return Checkpoint(file.parent, read_json(file), {})


def as_data(subject: ModelOverview, costs: list[Cost]) -> dict[str, Any]:
    """Everything that the text shows, as JSON types. Ratios are AHN to full attention."""
    from ahn.costs import count_model_parameters, count_parameters
    from ahn.shape import ModelShape

    shape = ModelShape.from_config(subject.hf_config)
    parameters, of = count_parameters(subject.hf_config, subject.config), count_model_parameters(subject.hf_config)
    return {
        "model": subject.name,
        "model_type": subject.hf_config.model_type,
        "model_parameters": of,
        "shape": dataclasses.asdict(shape),
        "trained_positions": getattr(subject.hf_config.get_text_config(), "max_position_embeddings", None),
        "ahn": dataclasses.asdict(subject.config),
        "memory_layers": shape.memory_layers(subject.config.full_attention_layers),
        "memory_parameters": parameters,
        "memory_share": parameters / of,
        "weights": [_weights(checkpoint) for checkpoint in subject.weights],
        "costs": [_cost_data(cost) for cost in costs],
    }


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    import math

    entries, memories = checkpoint.tensors.values(), checkpoint.ahn_tensors.values()
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "files": len({entry.file for entry in entries}),
        "bytes": sum(entry.size for entry in entries),
        "tensors": len(entries),
        "memory_tensors": len(memories),
        "memory_parameters": sum(math.prod(entry.shape) for entry in memories),
    }


def _cost_data(cost: Cost) -> dict[str, Any]:
    return dataclasses.asdict(cost) | {
        "cache_ratio": cost.cache_ratio,
        "bytes_ratio": cost.bytes_ratio,
        "mixer_ratio": cost.mixer_ratio,
        "model_ratio": cost.model_ratio,
    }


def _summary(subject: ModelOverview) -> list[tuple[str, str]]:
    data = as_data(subject, [])
    shape, config, layers = data["shape"], subject.config, data["memory_layers"]
    options = [name for name in ("router", "q_proj") if getattr(config, name)]
    rows = [
        ("model", f"{subject.name} ({data['model_type']}), {data['model_parameters']:,} parameters"),
        (
            "shape",
            f"{len(shape['layer_types'])} layers, hidden size {shape['hidden_size']}, {shape['heads']} query and "
            f"{shape['kv_heads']} key/value heads of {shape['head_dim']}, MLP {shape['intermediate_size']}, "
            f"vocabulary {shape['vocab_size']:,}",
        ),
        ("positions", f"{data['trained_positions']:,} in training" if data["trained_positions"] else "not limited"),
        ("memory", " + ".join([config.memory, *options])),
        ("exact", f"{config.sinks:,} sinks + window {config.window:,} = {config.lossless:,} tokens"),
        ("in layers", f"{_ranges(layers)} ({len(layers)} of {len(shape['layer_types'])})"),
        ("adds", f"{data['memory_parameters']:,} parameters, {_percent(data['memory_share'], 2)} of the model"),
    ]
    if config.quantized:
        rows.insert(5, (f"at {config.tier_label}", f"{config.quantized:,} tokens before the window"))
    for found in data["weights"]:
        text = f"{found['kind']}: {found['tensors']} tensors, {_unit(found['bytes'], 1024)}"
        text += f" in {found['files']} file{'s' * (found['files'] > 1)} of {found['path']}"
        if found["memory_tensors"]:
            text += f"; memory: {found['memory_tensors']} tensors, {found['memory_parameters']:,} parameters"
        rows.append(("weights", text))
    return rows


def _cache_table(costs: list[Cost]) -> Table:
    table = _table("Cache of one sequence, keys and values in bfloat16")
    for heading in ("full", "AHN", "AHN / full", "in numbers, as the paper counts"):
        table.add_column(heading, justify="right")
    for cost in costs:
        sizes = [_unit(usage.cache_bytes, 1024) for usage in (cost.full, cost.ahn)]
        table.add_row(f"{cost.length:,}", *sizes, _percent(cost.bytes_ratio), _percent(cost.cache_ratio))
    return table


def _flops_table(costs: list[Cost]) -> Table:
    table = _table("FLOPs to read a prompt")
    for heading in ("mixers full", "AHN", "AHN / full", "model full", "AHN", "AHN / full"):
        table.add_column(heading, justify="right")
    for cost in costs:
        mixers = [_unit(usage.mixer_flops, 1000) for usage in (cost.full, cost.ahn)]
        models = [_unit(usage.model_flops, 1000) for usage in (cost.full, cost.ahn)]
        ratios = (_percent(cost.mixer_ratio), _percent(cost.model_ratio))
        table.add_row(f"{cost.length:,}", *mixers, ratios[0], *models, ratios[1])
    return table


def _table(title: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("tokens", justify="right")
    return table


def _unit(value: float, base: int) -> str:
    power, units = 0, UNITS[base]
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if value >= 100 or power == 0 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {units[power]}".rstrip()


def _percent(ratio: float, digits: int = 1) -> str:
    # halves up, as the paper prints 25.85 and 25.95; the nudge undoes their binary representation
    return f"{100 * ratio + 1e-9:.{digits}f} %"


def _ranges(indices: tuple[int, ...]) -> str:
    """Ascending layer indices as "0-3, 5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _plot(subject: ModelOverview, costs: list[Cost], path: Path) -> None:
    from ahn.measure import plots

    lossless = subject.config.lossless
    low, high = max(1, lossless // 8), max(SHOWN[-1] * lossless, costs[-1].length)
    lengths = sorted({round(low * (high / low) ** (i / (POINTS - 1))) for i in range(POINTS)} | {lossless})
    path_or_id = Path(subject.name).resolve()
    name = path_or_id.parent.name if path_or_id.name == "config.json" else path_or_id.name
    title = f"{name} with {subject.config.memory}"
    plots.save(plots.cost_figure([subject.cost(n) for n in lengths], lossless, title), path)

"""Join a base model and an adapter into one checkpoint, and take such a checkpoint apart. No model is built."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ahn.checkpoint.adapter import checked_settings
from ahn.checkpoint.directory import CONFIG, INDEX, PICKLES, WEIGHTS, Checkpoint, is_ahn
from ahn.checkpoint.format import read_settings, report_window, transformers_config
from ahn.checkpoint.hub import local_directory
from ahn.checkpoint.stream import Entry, Meter, Progress, write_file
from ahn.checkpoint.validate import check_tensors, check_values
from ahn.errors import AHNError, check_path
from ahn.files import expanded, staged, write_json
from ahn.model.saving import base_config, base_reference, with_ahn
from ahn.shape import ModelShape

PathLike = str | os.PathLike[str]
NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "*.gguf", CONFIG, ".*", *PICKLES)
TEMPLATES = "additional_chat_templates"  # the one sub-directory that belongs to a tokenizer


def merge(base: PathLike, adapter: PathLike, out: PathLike, progress: Progress | None = None) -> Path:
    """Write a checkpoint that holds the base model and the AHN side by side.

    Every tensor keeps its bytes and dtype. The base's files keep their division into shards; the AHN is one shard more.
    Memory stays small (one slice of a tensor) whatever the size, and `out` appears only when it is complete.

    Args:
        base: directory or Hub id of a model with safetensors weights.
        adapter: directory or Hub id of an adapter, ours or published.
        out: new directory.
        progress: called with (bytes written, bytes in all).

    Returns:
        `out`.

    Raises:
        AHNError: base and adapter do not fit, a tensor is missing, extra, of the wrong shape or not finite, a file is
            damaged, or `out` is taken.
    """
    check_path(out)
    target = expanded(out)
    base_files = Checkpoint.open(local_directory(base)).require("base")
    ahn_files = Checkpoint.open(local_directory(adapter)).require("adapter")
    settings = checked_settings(ahn_files, transformers_config(base_files.config, base_files.path), str(base))
    check_values(ahn_files)
    report_window(ahn_files, settings, given=False)
    shards = [*by_file(base_files.tensors), ahn_files.tensors]
    meter = _meter(progress, base_files, ahn_files)
    with staged(target, meter.total) as directory:
        copy_other_files(base_files.path, directory)
        write_json(directory / CONFIG, with_ahn(base_files.config, settings, base_reference(base, target)))
        write_weights(directory, shards, meter)
    return target


def split(merged: PathLike, out: PathLike, progress: Progress | None = None) -> Path:
    """Write the two parts of a merged checkpoint, ours or published: `out/base` and `out/adapter`.

    `out/base` is an ordinary model directory with the tokenizer; `out/adapter` names it as its base by a relative path,
    so the two can move together. Bytes, shards, memory and atomicity are as in `merge`.

    Args:
        merged: directory or Hub id of a merged checkpoint.
        out: new directory.
        progress: called with (bytes written, bytes in all).

    Returns:
        `out`.

    Raises:
        AHNError: as `merge`.
    """
    check_path(out)
    target = expanded(out)
    whole = Checkpoint.open(local_directory(merged)).require("merged")
    shape = ModelShape.from_config(transformers_config(whole.config, whole.path))
    settings = read_settings(whole)
    if not whole.ahn_tensors:
        raise AHNError(
            f"The memory {settings.memory!r} of {whole.path} has no tensors, so there is nothing to split off."
        )
    check_tensors(whole, shape, settings)
    check_values(whole)
    report_window(whole, settings, given=False)
    config = base_config(whole.config)
    meter = _meter(progress, whole)
    with staged(target, meter.total) as directory:
        base, adapter = directory / "base", directory / "adapter"
        base.mkdir()
        adapter.mkdir()
        copy_other_files(whole.path, base)
        write_json(base / CONFIG, config)
        write_weights(base, by_file({n: e for n, e in whole.tensors.items() if not is_ahn(n)}), meter)
        write_json(adapter / CONFIG, with_ahn(config, settings, "../base"))
        write_weights(adapter, [whole.ahn_tensors], meter)
    return target


def _meter(progress: Progress | None, *checkpoints: Checkpoint) -> Meter:
    return Meter(sum(e.size for c in checkpoints for e in c.tensors.values()), progress)


def write_weights(directory: Path, shards: Sequence[Mapping[str, Entry]], meter: Meter) -> None:
    """Write each shard to one file, with an index when there are several, under transformers' names."""
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    for name, tensors in zip(names, shards, strict=True):
        write_file(directory / name, tensors, meter)
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        size = sum(entry.size for tensors in shards for entry in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)


def by_file(tensors: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    """The tensors grouped by the file they lie in."""
    groups: dict[Path, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        groups.setdefault(entry.file, {})[name] = entry
    return list(groups.values())


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what a checkpoint has besides weights and configuration: tokenizer, chat template, generation settings, …"""
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, target / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)

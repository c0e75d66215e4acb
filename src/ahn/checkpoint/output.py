"""Writing checkpoints: sharded safetensors with their index, and what lies beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ahn.checkpoint.directory import CONFIG, INDEX, PICKLES, WEIGHTS
from ahn.checkpoint.stream import Entry, Meter, write_file
from ahn.files import write_json

NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "*.gguf", CONFIG, ".*", *PICKLES)
TEMPLATES = "additional_chat_templates"  # the one sub-directory that belongs to a tokenizer


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

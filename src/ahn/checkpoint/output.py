"""Writing checkpoints: sharded safetensors with their index, and outputs that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ahn.checkpoint.directory import CONFIG, INDEX, PICKLES, WEIGHTS
from ahn.checkpoint.stream import Entry, Meter, write_file
from ahn.errors import AHNError

NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "*.gguf", CONFIG, ".*", *PICKLES)
TEMPLATES = "additional_chat_templates"  # the one sub-directory that belongs to a tokenizer


@contextlib.contextmanager
def staged(out: Path, size: int) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        out: must not exist, or be an empty directory.
        size: bytes that will be written, to refuse early when the disk is too small.

    Raises:
        AHNError: `out` is taken, the disk is too small, or writing fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AHNError(f"{out} exists already and is not an empty directory: choose another output or remove it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < size:
            raise AHNError(f"{out.parent} has {free / 1e9:.1f} GB free, the output needs {size / 1e9:.1f} GB.")
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            yield temporary
            temporary.chmod(0o755)  # mkdtemp's are private
            if out.exists():
                out.rmdir()
            temporary.rename(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise AHNError(f"Writing {out} failed: {error}.") from error


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


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to; what is there when the block ends well becomes `file`, in one step."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)

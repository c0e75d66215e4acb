"""ahn-tiny: a small real language model, and memories for it, shipped with the package.

Made by `benchmarks/quality/run.py --recipe tiny` from the standard library's sources; `README.md` beside the weights is
its model card. Load it with `AutoModelForCausalLM.from_pretrained(ahn.tiny.path())`.
"""

from __future__ import annotations

from pathlib import Path

from ahn.errors import AHNError

__all__ = ["adapter_path", "adapters", "path"]

_HERE = Path(__file__).parent


def path() -> Path:
    """Directory of the base model with its tokenizer.

    Raises:
        AHNError: the weights are not in this installation.
    """
    return _shipped(_HERE / "model", "config.json")


def adapters() -> tuple[str, ...]:
    """The memories that were distilled for it, some of `ahn.memory.names()`.

    Raises:
        AHNError: there are none in this installation.
    """
    found = (_HERE / "adapters").glob("*/model.safetensors")
    names = tuple(sorted(file.parent.name for file in found))
    if not names:
        raise _missing(_HERE / "adapters")
    return names


def adapter_path(memory: str) -> Path:
    """Directory of the adapter distilled for `memory`, one of `adapters()`.

    Raises:
        AHNError: there is none for this memory.
    """
    return _shipped(_HERE / "adapters" / memory, "model.safetensors")


def _shipped(directory: Path, file: str) -> Path:
    if not (directory / file).is_file():
        raise _missing(directory)
    return directory


def _missing(directory: Path) -> AHNError:
    return AHNError(
        f"ahn-tiny has no {directory.relative_to(_HERE)} in this installation; reinstall ahn, "
        "or train it with benchmarks/quality/run.py."
    )

"""A conversation in a file: named tensors and a description in the metadata, as one safetensors file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ahn.errors import AHNError
from ahn.files import write_tensors
from ahn.memory.layer import added_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "ahn-cache-1"


def write(path: str | Path, tensors: dict[str, Tensor], description: dict[str, Any], model: PreTrainedModel) -> None:
    """Write a conversation with a model to `path` (temporary file, then rename)."""
    path = Path(path)
    whole = {"format": FORMAT, **description, "fingerprint": fingerprint(model), "tensors": sorted(tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AHNError(f"{path.parent} cannot be made: {error.strerror or error}.") from error
    write_tensors(path, tensors, {"ahn": json.dumps(whole)})


def read(path: str | Path, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the model's device, and the description that `write` wrote for the same model and adapter.

    Raises:
        AHNError: the file is missing, damaged or not a conversation, or it was made with another base or adapter.
    """
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            description = json.loads((file.metadata() or {}).get("ahn", "{}"))
            # Copies have their own aligned memory: kernels round differently where it is not aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except FileNotFoundError:
        raise AHNError(f"There is no cache file {path}.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise AHNError(f"{path} is damaged or not a safetensors file ({error}).") from None
    if description.get("format") != FORMAT:
        raise AHNError(f"{path} is not a conversation saved by AHNCache.save.")
    if description["fingerprint"] != fingerprint(model):
        raise AHNError(f"{path} was written with another base model or adapter; its memory means nothing to this one.")
    lost = set(description.get("tensors", ())) - tensors.keys()  # older files do not say what they hold
    if lost:
        raise AHNError(f"{path} is incomplete: {min(lost)} is missing.")
    return tensors, description


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of the adapter's weights and of a sample of the base's: a state is only readable by what wrote it."""
    digest = hashlib.sha256()
    sample = model.get_input_embeddings().weight[:64]
    for x in [sample, *added_parameters(model).values()]:
        digest.update(x.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()

"""A conversation in a file: an `AHNCache` as one safetensors file with its description in the metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ahn.cache import AHNCache
from ahn.cache_layer import AHNLayer
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.visibility import Padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "ahn-cache-1"


def save(cache: AHNCache, path: str | Path, model: PreTrainedModel) -> None:
    """Write a cache to `path` (temporary file, then rename).

    Raises:
        AHNError: the cache is empty, or a layer of it is of a kind that cannot be written.
    """
    path = Path(path)
    if cache.seen == 0:
        raise AHNError("This cache has read nothing yet; there is nothing to save.")
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        for name, x in _layer_tensors(layer, index).items():
            tensors[f"layers.{index}.{name}"] = x.contiguous()
    if cache.padding is not None:
        tensors |= {f"padding.{name}": x for name, x in vars(cache.padding).items()}
    description = {
        "format": FORMAT,
        "config": dataclasses.asdict(cache.config),
        "seen": cache.seen,
        "fingerprint": fingerprint(model),
        "tensors": sorted(tensors),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, temporary, metadata={"ahn": json.dumps(description)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, model: PreTrainedModel) -> AHNCache:
    """Read a cache that `save` wrote, for the same model and adapter, onto the model's device.

    Raises:
        AHNError: the file is missing, damaged or not a cache, or it was made with another base, adapter or memory.
    """
    cache = AHNCache.for_model(model)
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
    described = description["config"]
    cache.config = AHNConfig(**described | {"full_attention_layers": tuple(described["full_attention_layers"])})
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        missing = {"keys", "values"} - own.keys()
        if missing and (own or isinstance(layer, AHNLayer)):
            raise AHNError(f"{path} is incomplete: {prefix}{min(missing)} is missing.")
        if isinstance(layer, AHNLayer):
            layer.window, layer.sinks = cache.config.window, cache.config.sinks
            layer.load_tensors(own, description["seen"])
            cache._batch = len(own["keys"])
        elif own:
            layer.lazy_initialization(own["keys"], own["values"])
            layer.keys, layer.values = own["keys"], own["values"]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = description["seen"]
    padding = {name.removeprefix("padding."): x for name, x in tensors.items() if name.startswith("padding.")}
    if padding:
        cache.padding = Padding(**padding)
    return cache


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of the adapter's weights and of a sample of the base's: a state is only readable by what wrote it."""
    from ahn.adapter import adapter_parameters  # adapter imports cache, which names this function

    digest = hashlib.sha256()
    sample = model.get_input_embeddings().weight[:64]
    for x in [sample, *adapter_parameters(model).values()]:
        digest.update(x.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _layer_tensors(layer: Any, index: int) -> dict[str, Tensor]:
    if isinstance(layer, AHNLayer):
        return layer.tensors()
    if not layer.is_initialized:
        return {}
    if not hasattr(layer, "keys") or layer.keys is None:
        raise AHNError(f"Layer {index} keeps a {type(layer).__name__}, which cannot be saved.")
    return {"keys": layer.keys, "values": layer.values}

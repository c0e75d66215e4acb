"""Which model, adapter and tokenizer a conversation was read with: its state means nothing to any other."""

from __future__ import annotations

import hashlib
import json
import reprlib
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn import private
from ahn.errors import AHNError
from ahn.files import read_json
from ahn.memory.layer import added_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = 256
"""Numbers that are looked at in each of the base model's tensors, evenly spaced."""


class ModelOf(weakref.ref["PreTrainedModel"]):
    """The model that a cache was made for. A copy of the cache has the same; one that was pickled has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOf:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def origin(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one model from another, as JSON types.

    Returns:
        `base`: a digest of a sample of each of the base model's tensors by name, None for one that cannot be looked
        into (it lies on disk, or is packed in a way that has no elements); `adapter`: a digest of all its weights;
        `dtype`: the model's; `tokenizer`: a digest of its vocabulary, None if the model's folder holds none.
    """
    model._ahn.share.check_whole("A conversation's file", "save and load it with a model without tp_plan")
    return {
        "base": {name: _digest_of_sample(x) for name, x in _base_tensors(model)},
        "adapter": _adapter_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": tokenizer_digest(model.name_or_path),
    }


def check_origin(saved: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    """Compare what `origin` said when a file was written with what it says of the model here.

    Raises:
        AHNError: they differ; the message says in what.
    """
    if saved.get("dtype") != here["dtype"]:
        dtype = reprlib.repr(saved.get("dtype"))
        raise AHNError(f"{path} was written with the model in {dtype}, this one is in {here['dtype']!r}.")
    other = f"{path} was written with another base model or adapter; its memory means nothing to this one"
    if saved.get("adapter") != here["adapter"]:
        raise AHNError(f"{other} (the adapter's weights differ).")
    base = saved.get("base")
    if not isinstance(base, dict) or base.keys() != here["base"].keys():
        raise AHNError(f"{other} (the base models have different tensors).")
    differing = [name for name, x in here["base"].items() if x is not None and base[name] not in (x, None)]
    if differing:
        raise AHNError(f"{other} ({len(differing)} tensors of the base differ, the first is {differing[0]}).")
    if None not in (known := (saved.get("tokenizer"), here["tokenizer"])) and known[0] != known[1]:
        raise AHNError(f"{path} was written with another tokenizer; new text would be read in other tokens.")


def first_fingerprint(model: PreTrainedModel) -> str:
    """What files of the first format hold: a hash of the adapter's weights and of 64 rows of the embedding."""
    digest = hashlib.sha256()
    for x in [model.get_input_embeddings().weight[:64], *added_parameters(model).values()]:
        digest.update(x.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(folder: str) -> str | None:
    """Of the tokens and their ids in a local model folder's tokenizer.json, however the file is laid out."""
    file = Path(folder) / "tokenizer.json"
    if not folder or not file.is_file():
        return None
    status = file.stat()
    return _vocabulary_digest(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _vocabulary_digest(file: Path, changed: int, size: int) -> str | None:
    try:
        content = read_json(file)
        added = sorted((token["id"], token["content"]) for token in content.get("added_tokens") or ())
        vocabulary = content["model"]["vocab"]
    except (AHNError, KeyError, TypeError):
        return None  # loading the tokenizer says what is wrong with it
    text = json.dumps([vocabulary, added], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _base_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers (some quantized models have only these), by name."""
    added = added_parameters(model)
    yield from ((name, x) for name, x in model.named_parameters() if name not in added)
    for prefix, module in model.named_modules():
        for name, x in private.saved_buffers(module):
            yield f"{prefix}.{name}".removeprefix("."), x


def _adapter_digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(added_parameters(model).items()):
        digest.update(name.encode())
        digest.update(x.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_sample(x: Tensor) -> str | None:
    if x.device.type == "meta":
        return None
    try:
        flat = x.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].to("cpu", torch.float64)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return None
    return hashlib.sha256(repr(tuple(x.shape)).encode() + sample.numpy().tobytes()).hexdigest()[:16]

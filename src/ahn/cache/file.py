"""A conversation in a file: named tensors and a description in the metadata, as one safetensors file.

Nothing in a file is trusted: the description is checked against the tensors' dtypes and shapes before any is read
(`ahn.cache.checks`), the tensors against a checksum, and the model against the one that wrote it (`ahn.cache.origin`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ahn import private
from ahn.cache.checks import (
    DTYPES,
    TYPES,
    Stored,
    check_layout,
    check_messages,
    check_values,
    read_config,
    read_waiting,
)
from ahn.cache.origin import check_origin, first_fingerprint
from ahn.cache.transfer import THREADS, Transfer
from ahn.config import AHNConfig
from ahn.errors import AHNError, check_path, reason
from ahn.files import json_object, replacing
from ahn.shape import ModelShape
from ahn.wrappers import attention_of, decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "ahn-cache-3"
SECOND_FORMAT = "ahn-cache-2"
"""With one checksum over the bytes of all tensors, which cannot be worked out in parts."""
FIRST_FORMAT = "ahn-cache-1"
"""Without a checksum, and with a fingerprint of 64 rows of the embedding instead of an origin."""
FORMATS = (FORMAT, SECOND_FORMAT, FIRST_FORMAT)


def write(path: str | Path, tensors: dict[str, Tensor], description: dict[str, Any], of: dict[str, Any]) -> None:
    """Write a conversation to `path`, whole or not at all.

    Args:
        of: the `origin` of its model.

    Raises:
        AHNError: it cannot be written; a file that was there is unchanged.
    """
    check_path(path, "a file")
    path = Path(path)
    whole = {"format": FORMAT, **description, "origin": of}
    # In a safetensors file each tensor is to lie at a multiple of the size of its numbers.
    ordered = dict(sorted(tensors.items(), key=lambda named: (-named[1].dtype.itemsize, named[0])))
    start = len(_header(ordered, whole | {"checksum": "0" * 64}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AHNError(f"{path.parent} cannot be made: {reason(error)}.") from error
    with replacing(path) as temporary:
        temporary.touch(0o600)
        digests, place = {}, start
        with Transfer(next(iter(tensors.values())).device) as transfer:
            for name, x in ordered.items():
                digests[name], place = transfer.write(temporary, place, x), place + x.nbytes
        whole["checksum"] = _joined([_title(n, tensors[n]) + digests[n].result() for n in sorted(tensors)], whole)
        with temporary.open("r+b") as handle:
            handle.write(_header(ordered, whole))


def _header(tensors: Mapping[str, Tensor], description: dict[str, Any]) -> bytes:
    """What a safetensors file begins with: its length, and where which tensor lies, in this order."""
    header: dict[str, Any] = {"__metadata__": {"ahn": json.dumps(description)}}
    place = 0
    for name, x in tensors.items():
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [place, place + x.nbytes]}
        place += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(
    path: str | Path, model: PreTrainedModel, of: dict[str, Any]
) -> tuple[dict[str, Tensor], AHNConfig, int, list[dict[str, str]]]:
    """The tensors, on the model's device, the settings, the tokens read, and the messages that were kept with them, as
    `write` wrote them for this model.

    Args:
        of: the model's `origin`.

    Raises:
        AHNError: the file is missing, damaged or not a conversation, or it was made with another base or adapter.
    """
    check_path(path, "a file")
    path = Path(path)
    if not path.exists():
        raise AHNError(f"There is no cache file {path}.")
    if not path.is_file():
        raise AHNError(f"{path} is not a file.")
    try:
        before = path.stat()
        with safe_open(path, framework="pt") as file:
            description = _description(file, path)
            stored = _stored(file)
            config, seen = _check(description, stored, model, path, of)
            tensors, digests = _read(path, before.st_size, stored, _device(model))
        if not os.path.samestat(before, path.stat()):  # it was replaced meanwhile
            return read(path, model, of)
    except (SafetensorError, OSError, EOFError) as error:
        raise AHNError(f"{path} is damaged or not a safetensors file ({error}).") from None
    if (kind := description["format"]) != FIRST_FORMAT:
        older = kind == SECOND_FORMAT
        found = checksum(sorted(tensors.items()), description) if older else _joined(digests, description)
        if description.get("checksum") != found:
            raise AHNError(f"{path} is damaged: its checksum is another than that of its content.")
    check_values(tensors, seen, str(path))
    return tensors, config, seen, description.get("messages", [])


def describe(path: Path) -> dict[str, Any]:
    """What a file says of itself, without its tensors; not to be trusted.

    Raises:
        AHNError: it cannot be read, or is not a conversation.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description = _description(file, path)
    except (SafetensorError, OSError) as error:
        raise AHNError(f"{path} is damaged or not a safetensors file ({error}).") from None
    if description.get("format") not in FORMATS:
        raise AHNError(f"{path} is not a conversation saved by AHNCache.save.")
    return description


def _description(file: Any, path: Path) -> dict[str, Any]:
    return json_object((file.metadata() or {}).get("ahn", "{}"), f"The description in {path}")


def checksum(tensors: Iterable[tuple[str, Tensor]], description: Mapping[str, Any]) -> str:
    """sha256 of all that a file says: tensors by name with dtype, shape and sha256, and the rest of the description.

    Args:
        tensors: sorted by name.
    """
    with ThreadPoolExecutor(THREADS) as pool:  # Python lets other threads run while it hashes
        parts = pool.map(_whole if description.get("format") == SECOND_FORMAT else _summed, tensors)
        return _joined(parts, description)


def _joined(parts: Iterable[bytes], description: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in description.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _summed(named: tuple[str, Tensor]) -> bytes:
    return _title(*named) + hashlib.sha256(_bytes(named[1])).digest()


def _whole(named: tuple[str, Tensor]) -> bytes:
    return _title(*named) + bytes(_bytes(named[1]))


def _title(name: str, x: Tensor) -> bytes:
    return f"\0{name} {x.dtype} {tuple(x.shape)}\0".encode()


def _bytes(x: Tensor) -> Any:
    return x.cpu().reshape(-1).view(torch.uint8).numpy().data


def _read(
    path: Path, size: int, stored: dict[str, Stored], device: torch.device
) -> tuple[dict[str, Tensor], list[bytes]]:
    """All tensors of a file of this size, and of each by name what a checksum is made of.

    Args:
        stored: in the order in which they lie, at the file's end.
    """
    tensors, digests, place = {}, {}, size
    with Transfer(device) as transfer:
        for name, one in reversed(stored.items()):
            dtype = TYPES[one.dtype]
            place -= math.prod(one.shape) * dtype.itemsize
            tensors[name], digests[name] = transfer.read(path, place, one.shape, dtype)
    names = sorted(tensors)
    return tensors, [_title(name, tensors[name]) + digests[name].result() for name in names]


def _device(model: PreTrainedModel) -> torch.device:
    """Where the first memory computes: weights of the base may lie elsewhere."""
    layer = next(layer for layer in decoder_of(model).layers if hasattr(layer, "ahn"))
    return private.execution_device(attention_of(model, layer.ahn.index).o_proj)


def _stored(file: Any) -> dict[str, Stored]:
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    return {name: Stored(x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}


def _check(
    description: dict[str, Any], found: dict[str, Stored], model: PreTrainedModel, path: Path, here: dict[str, Any]
) -> tuple[AHNConfig, int]:
    kind = description.get("format")
    if kind not in FORMATS:
        raise AHNError(f"{path} is not a conversation saved by AHNCache.save.")
    if kind != FIRST_FORMAT:
        saved = description.get("origin")
        check_origin(saved if isinstance(saved, dict) else {}, here, path)
    elif description.get("fingerprint") != first_fingerprint(model):
        raise AHNError(f"{path} was written with another base model or adapter; its memory means nothing to this one.")
    config, seen = read_config(description, model.ahn_config, str(path))
    check_messages(description.get("messages", []), str(path))
    waiting = read_waiting(description, config, seen, str(path))
    check_layout(found, config, seen, waiting, ModelShape.from_config(model.config), str(path))
    return config, seen

"""`from_pretrained`: from a checkpoint with an AHN, in our layout or the published one, to a model that generates."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ahn.checkpoint.adapter import load_ahn
from ahn.checkpoint.directory import Checkpoint
from ahn.checkpoint.format import BASE_NAME, check_base, read_settings, transformers_config
from ahn.checkpoint.hub import local_directory
from ahn.checkpoint.names import is_ahn
from ahn.checkpoint.validate import check_tensors
from ahn.errors import AHNError

PathLike = str | os.PathLike[str]
HUB = ("cache_dir", "force_download", "local_files_only", "token")


def from_pretrained(
    directory: PathLike,
    base: PathLike | None = None,
    window: int | None = None,
    sinks: int | None = None,
    quantized: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model with its AHN.

    Args:
        directory: an adapter or a merged checkpoint, ours or published: a directory or a Hub id.
        base: for an adapter, the base model's directory or Hub id. Default: what the adapter's configuration names.
        window: window to use. Default: the saved one; for published checkpoints 32640, never their `sliding_window`.
        sinks: likewise; for published checkpoints 128.
        quantized: likewise; for published checkpoints 0.
        kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `dtype` or `device_map`; `revision` is that of
            `directory`.

    Returns:
        The model in evaluation mode.

    Raises:
        AHNError: the base is not named or not found, does not fit, or a file is missing or damaged.
    """
    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    revision = {"revision": kwargs.pop("revision")} if "revision" in kwargs else {}
    checkpoint = Checkpoint.open(local_directory(directory, **hub, **revision))
    if checkpoint.kind == "base":
        raise AHNError(
            f"{checkpoint.path} has no AHN tensors: load it with transformers, then ahn.attach or ahn.load_adapter."
        )
    if checkpoint.kind == "merged":
        if base is not None:
            raise AHNError(f"{checkpoint.path} is a merged checkpoint and brings its own base model: leave base out.")
        model = _load_merged(checkpoint, kwargs)
        model.config._name_or_path = model.name_or_path = str(directory)
    else:
        model = _load_base(checkpoint, base, hub, kwargs)
    return load_ahn(model, checkpoint, window, sinks, quantized).eval()


def _load_merged(checkpoint: Checkpoint, kwargs: dict[str, Any]) -> PreTrainedModel:
    config = transformers_config(checkpoint.config, checkpoint.path)
    _check_ahn(checkpoint, config, str(checkpoint.path))
    model = _load_model(checkpoint.path, {"config": config} | kwargs)
    named = _named_base(checkpoint)
    setattr(model.config, BASE_NAME, None if named is None else str(named))
    return model


def _load_base(
    adapter: Checkpoint, base: PathLike | None, hub: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    named = base or _named_base(adapter)
    if not named:
        raise AHNError(
            f"{adapter.path} does not say which base model it belongs to: pass base=, a directory or Hub id."
        )
    try:
        path = local_directory(named, **hub)
    except AHNError as error:
        raise AHNError(f"Base model of {adapter.path} not found, pass base=, a directory or Hub id. {error}") from error
    files = Checkpoint.open(path).require("base")
    # Before the base is loaded, which can take minutes.
    _check_ahn(adapter, transformers_config(files.config, path), str(named))
    model = _load_model(path, kwargs)
    model.config._name_or_path = model.name_or_path = str(named)
    return model


def _named_base(checkpoint: Checkpoint) -> PathLike | None:
    """The base that a configuration names; a path that starts with a dot is relative to the checkpoint."""
    name = checkpoint.config.get(BASE_NAME) or checkpoint.config.get("_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    return Path(os.path.normpath(checkpoint.path / name)) if name.startswith(".") else name


def _check_ahn(checkpoint: Checkpoint, base: Any, base_name: str) -> None:
    shape = check_base(checkpoint, base, base_name)
    check_tensors(checkpoint, shape, read_settings(checkpoint))


def _load_model(path: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load with transformers; unlike there, an absent weight is an error, and AHN weights beside the base are none."""
    with _without_load_report():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            raise AHNError(f"transformers cannot load {path}: {error}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise AHNError(f"{path} lacks {len(absent)} weights of {type(model).__name__}, the first is {absent[0]}.")
    unused = sorted(name for name in info["unexpected_keys"] if not is_ahn(name))
    if unused:
        logging.getLogger("ahn").warning("%s has %d unused weights, the first is %s.", path, len(unused), unused[0])
    return model


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from listing the AHN's weights as unexpected."""
    source = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)

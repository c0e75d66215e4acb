"""What a checkpoint's `config.json` says about its AHN, in our form and in the published one.

Ours is what `ahn.model.saving` writes. Published configurations have the base model's type and no block `ahn`, and
their `sliding_window` is a left-over of training.
"""

import dataclasses
import logging
import reprlib
from pathlib import Path
from typing import Any, Unpack

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ahn import memory
from ahn.checkpoint.directory import CONFIG, Checkpoint
from ahn.config import (
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    MODEL_TYPE,
    PUBLISHED_NAME,
    SAVED_BLOCK,
    AHNConfig,
    Reach,
    overridden,
)
from ahn.errors import AHNError
from ahn.model.saving import TYPED, base_config
from ahn.shape import ModelShape

logger = logging.getLogger("ahn")

_OF_WEIGHTS = ("dtype", "torch_dtype", "quantization_config", "device_map")
"""Arguments that say how weights are loaded, though a configuration may have them too."""


def read_settings(checkpoint: Checkpoint, **reach: Unpack[Reach]) -> AHNConfig:
    """The settings of a checkpoint's AHN.

    Args:
        reach: overrides what is saved, which for published checkpoints is window 32640, sinks 128, quantized 0 and
            max_distance 0, the published placing of sinks.
    """
    config, file = checkpoint.config, checkpoint.path / CONFIG
    settings = _own_settings(config[SAVED_BLOCK], file) if SAVED_BLOCK in config else _published_settings(config, file)
    return overridden(settings, **reach)


def report_window(checkpoint: Checkpoint, settings: AHNConfig, given: bool) -> None:
    """Log which window and sinks are used and why.

    A warning when a published checkpoint is used with the defaults, because whoever read its `sliding_window` would
    expect another window; information otherwise.

    Args:
        given: whether the caller chose both window and sinks.
    """
    published = SAVED_BLOCK not in checkpoint.config
    leftover = checkpoint.config.get("sliding_window") if published else None
    origin = "as given" if given else "default where not given" if published else "as saved where not given"
    message = f"{checkpoint.path}: window {settings.window}, sinks {settings.sinks} ({origin})"
    if leftover is not None:
        message += f"; sliding_window {leftover} in its {CONFIG} is a left-over of training and is ignored"
    logger.log(logging.WARNING if leftover is not None and not given else logging.INFO, "%s.", message)


def _own_settings(block: Any, file: Path) -> AHNConfig:
    known = {field.name for field in dataclasses.fields(AHNConfig)}
    if not isinstance(block, dict) or "memory" not in block:
        raise AHNError(f"{file}: the block {SAVED_BLOCK!r} names no memory.")
    of_base = {name for typed in TYPED for name in (typed, f"base_{typed}")}  # older files had them without a prefix
    if unknown := sorted(block.keys() - known - of_base):
        names = reprlib.repr(unknown)
        logger.warning("%s: this version of ahn does not know %s, which a newer one may have written.", file, names)
    return AHNConfig.saved({name: value for name, value in block.items() if name in known})


def _published_settings(config: dict[str, Any], file: Path) -> AHNConfig:
    name = config.get(PUBLISHED_NAME)
    if not isinstance(name, str):
        raise AHNError(f"{file} names no memory: it has neither a block {SAVED_BLOCK!r} nor {PUBLISHED_NAME!r}.")
    return AHNConfig(
        memory=memory.by_published_name(name).name,
        window=DEFAULT_WINDOW,
        sinks=DEFAULT_SINKS,
        full_attention_layers=_layer_ids(config.get("fa_layer_ids"), file),
        router=bool(config.get("use_ahn_router")),
        q_proj=bool(config.get("use_q_proj")),
        max_distance=0,
    )


def _layer_ids(value: Any, file: Path) -> tuple[int, ...]:
    """Published `fa_layer_ids`: absent, a list, or a string such as "0,1"."""
    try:
        parts = value.replace(",", " ").split() if isinstance(value, str) else value or ()
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise AHNError(f"{file}: fa_layer_ids must list layer indices, got {value!r}.") from None


def transformers_config(config: dict[str, Any], path: Path) -> Any:
    """The `transformers` configuration object of the base model that a `config.json` describes."""
    config = base_config(config)
    check_kernels(config, path / CONFIG)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type == MODEL_TYPE or model_type not in CONFIG_MAPPING:
        raise AHNError(f"{path / CONFIG} has model_type {reprlib.repr(model_type)}, unknown to this transformers.")
    try:
        return CONFIG_MAPPING[model_type].from_dict(config)
    except Exception as error:  # transformers validates with many exception types
        reason = " ".join(str(error).split())[:300]
        raise AHNError(f"{path / CONFIG} is not a valid {model_type} configuration: {reason}") from error


def check_kernels(config: dict[str, Any], file: Path) -> None:
    """Raises AHNError if a configuration asks for kernels from the Hub: transformers would run code of their authors.

    What transformers saves never does; a caller can still ask for one (`attn_implementation=`).
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_kernels(value, file)
        named = value.values() if isinstance(value, dict) else (value,)
        if name.endswith("_implementation") and any(isinstance(kernel, str) and "/" in kernel for kernel in named):
            raise AHNError(
                f"{file} asks for code from the Hub ({name}: {reprlib.repr(value)}), which is not run: remove the line."
            )


def changed(config: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A configuration with what arguments of `from_pretrained` change in it, as in transformers, and the others."""
    kept = {name: x for name, x in arguments.items() if name in _OF_WEIGHTS}
    rest = {name: x for name, x in arguments.items() if name not in _OF_WEIGHTS}
    config, rest = type(config).from_dict(config.to_dict(), return_unused_kwargs=True, **rest)
    return config, rest | kept


def check_base(adapter: Checkpoint, base: Any, base_name: str) -> ModelShape:
    """The shape of `base`, a transformers configuration, if it is the kind of model that the adapter belongs to."""
    own = transformers_config(adapter.config, adapter.path)
    wanted, given = _identity(own), _identity(base)
    wrong = [f"{name} {given[name]} instead of {wanted[name]}" for name in wanted if given[name] != wanted[name]]
    if wrong:
        raise AHNError(
            f"The adapter {adapter.path} does not fit the base model {base_name}: it has {', '.join(wrong)}."
        )
    return ModelShape.from_config(base)


def _identity(config: Any) -> dict[str, Any]:
    shape = ModelShape.from_config(config)
    return {
        # A text model and the text part of a multimodal one differ in name only.
        "model_type": config.get_text_config(decoder=True).model_type.removesuffix("_text"),
        "hidden_size": shape.hidden_size,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }

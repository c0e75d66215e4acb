"""What a checkpoint's `config.json` says about its AHN, in our form and in the published one.

Ours is the base model's configuration, the published names of the settings (`_ahn_implementation`, `use_ahn_router`,
`use_q_proj`, `fa_layer_ids`), `base_model_name_or_path`, and a block `ahn` with every field of `AHNConfig`. Published
configurations have no such block, and their `sliding_window` is a left-over of training.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import reprlib
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ahn import memory
from ahn.checkpoint.directory import CONFIG, Checkpoint
from ahn.config import ARCHITECTURE, DEFAULT_SINKS, DEFAULT_WINDOW, MODEL_TYPE, AHNConfig
from ahn.errors import AHNError
from ahn.shape import ModelShape

logger = logging.getLogger("ahn")

BLOCK = "ahn"
BASE_NAME = "base_model_name_or_path"
TYPED = ("model_type", "architectures")
"""What a merged checkpoint says of itself; its block keeps the base model's."""
STRUCTURE = ("_ahn_implementation", "use_ahn_router", "use_q_proj", "fa_layer_ids")
# Left-overs of the published trainer. `loss_type` must go: transformers would look its value up among its own losses.
TRAINING = (
    "_layer_implementation",
    "ahn_position",
    "dy_num_attn_sinks",
    "dy_sliding_window",
    "loss_type",
    "num_attn_sinks",
    "sliding_window_type",
    "use_normalized_l2",
)


def read_settings(
    checkpoint: Checkpoint,
    window: int | None = None,
    sinks: int | None = None,
    quantized: int | None = None,
    max_distance: int | None = None,
) -> AHNConfig:
    """The settings of a checkpoint's AHN.

    Args:
        checkpoint: an adapter or a merged checkpoint, ours or published.
        window: overrides the saved window. Default: the saved one; for published checkpoints 32640.
        sinks: likewise; for published checkpoints 128.
        quantized: likewise; for published checkpoints 0.
        max_distance: likewise; for published checkpoints 0, the published placing of sinks.

    Raises:
        AHNError: the configuration names no memory, an unknown one, or values out of range.
    """
    config, file = checkpoint.config, checkpoint.path / CONFIG
    settings = _own_settings(config[BLOCK], file) if BLOCK in config else _published_settings(config, file)
    given = {"window": window, "sinks": sinks, "quantized": quantized, "max_distance": max_distance}
    return settings.replace(**{name: value for name, value in given.items() if value is not None})


def report_window(checkpoint: Checkpoint, settings: AHNConfig, given: bool) -> None:
    """Log which window and sinks are used and why.

    A warning when a published checkpoint is used with the defaults, because whoever read its `sliding_window` would
    expect another window; information otherwise.

    Args:
        checkpoint: where the settings come from.
        settings: what is used.
        given: whether the caller chose both window and sinks.
    """
    published = BLOCK not in checkpoint.config
    leftover = checkpoint.config.get("sliding_window") if published else None
    origin = "as given" if given else "default where not given" if published else "as saved where not given"
    message = f"{checkpoint.path}: window {settings.window}, sinks {settings.sinks} ({origin})"
    if leftover is not None:
        message += f"; sliding_window {leftover} in its {CONFIG} is a left-over of training and is ignored"
    logger.log(logging.WARNING if leftover is not None and not given else logging.INFO, "%s.", message)


def _own_settings(block: Any, file: Path) -> AHNConfig:
    known = {field.name for field in dataclasses.fields(AHNConfig)}
    if not isinstance(block, dict) or "memory" not in block:
        raise AHNError(f"{file}: the block {BLOCK!r} names no memory.")
    return AHNConfig.saved({name: value for name, value in block.items() if name in known})


def _published_settings(config: dict[str, Any], file: Path) -> AHNConfig:
    name = config.get("_ahn_implementation")
    if not isinstance(name, str):
        raise AHNError(f"{file} names no memory: it has neither a block {BLOCK!r} nor '_ahn_implementation'.")
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


def with_ahn(base_config: dict[str, Any], settings: AHNConfig, base_name: str | None) -> dict[str, Any]:
    """The configuration to save beside AHN weights: the base model's plus the settings, in both forms."""
    return base_config | {
        "_ahn_implementation": memory.get(settings.memory).published_name,
        "use_ahn_router": settings.router,
        "use_q_proj": settings.q_proj,
        "fa_layer_ids": list(settings.full_attention_layers),
        BLOCK: dataclasses.asdict(settings),
        BASE_NAME: base_name,
    }


def merged_config(base_config: dict[str, Any], settings: AHNConfig, base_name: str | None) -> dict[str, Any]:
    """The configuration of base model and AHN in one checkpoint.

    Its model type is our own: where ahn was imported, transformers then loads it with its memory, and elsewhere it says
    that it does not know the type. Under the base model's type it would load the base alone and say nothing.
    """
    whole = with_ahn(base_config, settings, base_name)
    whole[BLOCK] |= {name: base_config.get(name) for name in TYPED}
    return whole | {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}


def base_config(config: dict[str, Any]) -> dict[str, Any]:
    """The base model's own configuration: without settings of an AHN and what the published trainer left behind."""
    block = config.get(BLOCK)
    if config.get("model_type") == MODEL_TYPE and isinstance(block, dict):
        config = config | {name: block.get(name) for name in TYPED}
    dropped = {BLOCK, BASE_NAME, *STRUCTURE, *TRAINING}
    kept = {name: value for name, value in config.items() if name not in dropped}
    if "_ahn_implementation" in config and BLOCK not in config:
        # Published: its window and its modeling file are the trainer's, the base model has neither.
        kept = {name: value for name, value in kept.items() if name not in ("auto_map", "layer_types")}
        kept |= {"use_sliding_window": False, "sliding_window": None}
        ordinary = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kept.get("model_type"))
        if ordinary and not any(hasattr(transformers, name) for name in kept.get("architectures") or ()):
            kept["architectures"] = [ordinary]
    return kept


def transformers_config(config: dict[str, Any], path: Path) -> Any:
    """The `transformers` configuration object of the base model that a `config.json` describes."""
    config = base_config(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type == MODEL_TYPE or model_type not in CONFIG_MAPPING:
        raise AHNError(f"{path / CONFIG} has model_type {reprlib.repr(model_type)}, unknown to this transformers.")
    try:
        return CONFIG_MAPPING[model_type].from_dict(config)
    except Exception as error:  # transformers validates with many exception types
        reason = " ".join(str(error).split())
        raise AHNError(f"{path / CONFIG} is not a valid {model_type} configuration: {reason}") from error


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


def base_reference(base: str | os.PathLike[str], directory: Path) -> str:
    """How a checkpoint in `directory` names its base: a Hub id as it is, a directory beside it by a relative path."""
    path = Path(base).expanduser()
    if not path.is_dir():
        return str(base)
    path, directory = path.resolve(), directory.resolve()
    if path.is_relative_to(directory.parent):
        relative = Path(os.path.relpath(path, directory)).as_posix()
        return relative if relative.startswith("..") else f"./{relative}"
    return str(path)

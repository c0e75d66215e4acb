"""What `config.json` says about a model with an AHN, and `save_pretrained` of such a model.

A saved configuration is the base model's under a model type of our own, with the published names of the settings
(`_ahn_implementation`, `use_ahn_router`, `use_q_proj`, `fa_layer_ids`), `base_model_name_or_path`, and a block `ahn`
with every field of `AHNConfig`. Where ahn was imported, transformers loads the type with its memory; elsewhere it says
that it does not know it. Under the base model's type it would load the base alone and say nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from ahn import memory, private
from ahn.config import ARCHITECTURE, MODEL_TYPE, PUBLISHED_NAME, SAVED_BLOCK, AHNConfig
from ahn.errors import AHNError
from ahn.files import check_folder, expanded, write_json
from ahn.memory.key_basis import SAVE_ANOTHER, check_bases
from ahn.memory.layer import added_parameters

BASE_NAME = "base_model_name_or_path"
TYPED = ("model_type", "architectures", "auto_map")
"""What a checkpoint says of itself; its block keeps the base model's as `base_…`.

Without the prefix a configuration class of transformers would take the block for its own, and default sizes with it.
"""
STRUCTURE = (PUBLISHED_NAME, "use_ahn_router", "use_q_proj", "fa_layer_ids")
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


def save(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`model.save_pretrained`: base model and AHN in one checkpoint, for `ahn.from_pretrained` and the Auto classes.

    Raises:
        AHNError: a state dict was given that lacks parameters of the AHN, the base's weights are packed in a way that
            no file holds, a basis of keys would not load, or the directory cannot be written.
    """
    check_folder(expanded(save_directory))  # transformers logs that it is a file, and goes on
    model._ahn.share.check_whole("Saving a model with its memory", "merge base and adapter with ahn merge")
    given = args[1] if len(args) > 1 else kwargs.get("state_dict")
    if given is not None and (absent := [name for name in added_parameters(model) if name not in given]):
        raise AHNError(f"The state dict to save lacks {len(absent)} tensors of the AHN, the first is {absent[0]}.")
    if packed := [name for name, x in (given or model.state_dict()).items() if not isinstance(x, Tensor)]:
        raise AHNError(
            f"{packed[0]} is no tensor: torch's quantization has packed the base's weights, which no checkpoint holds. "
            "Save the memory alone (ahn.save_adapter), or the model before it is quantized."
        )
    check_bases(given or dict(added_parameters(model)), "The model is not saved", SAVE_ANOTHER)
    added = dict(added_parameters(model))
    if private.saved_names(model, added) != added.keys():  # under other names nobody would find the memory again
        kwargs["save_original_format"] = False
    with _own_configuration(model) as written:
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if not written and getattr(model, "_hf_peft_config_loaded", False):
        warn_of_peft(model, PEFT)


PEFT = "base_model."
"""Where a PEFT model keeps the model inside."""


def warn_of_peft(model: PreTrainedModel, prefix: str, keep_vars: bool = False) -> None:
    """Before a model's state dict is made, under this prefix: say that what PEFT saves of it lacks the memory.

    The memory's parameters are in the state dict, but PEFT's `save_pretrained` makes one and takes its own out of it.
    """
    if PEFT in prefix:
        warnings.warn(
            "What PEFT saves of this model holds the PEFT adapter alone. The AHN is saved by "
            "ahn.save_adapter(model, directory).",
            stacklevel=2,
        )


@contextlib.contextmanager
def _own_configuration(model: PreTrainedModel) -> Iterator[list[Path]]:
    """Inside the block the model's configuration saves itself as `saved_config`; yields the files it wrote.

    Weights are written, and pushed to the Hub, after it: a folder with an AHN's tensors never has the base's type.
    """
    written: list[Path] = []

    def save_pretrained(directory: str | os.PathLike[str], **kwargs: Any) -> None:
        del model.config.save_pretrained  # what is saved is all that a configuration has, this too
        model.config.save_pretrained(directory, **kwargs)
        path = Path(directory)
        write_json(path / CONFIG_NAME, saved_config(model, path))
        written.append(path / CONFIG_NAME)

    model.config.save_pretrained = save_pretrained
    try:
        yield written
    finally:
        vars(model.config).pop("save_pretrained", None)


def saved_config(model: PreTrainedModel, directory: Path, settings: AHNConfig | None = None) -> dict[str, Any]:
    """What `config.json` in `directory` says of a model with an AHN, in an adapter as in a whole checkpoint.

    Args:
        settings: of the AHN, if not those that the model has now.
    """
    config = base_config(model.config.to_diff_dict())
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    # A merged checkpoint is not its own base; from_pretrained notes what its configuration says.
    name = getattr(model.config, BASE_NAME, model.name_or_path)
    return with_ahn(config, settings or model.ahn_config, base_reference(name, directory) if name else None)


def with_ahn(base_config: dict[str, Any], settings: AHNConfig, base_name: str | None) -> dict[str, Any]:
    """The base model's configuration as it is saved beside AHN weights."""
    kept = {name: value for name, value in base_config.items() if name not in TYPED}
    return kept | {
        PUBLISHED_NAME: memory.get(settings.memory).published_name,
        "use_ahn_router": settings.router,
        "use_q_proj": settings.q_proj,
        "fa_layer_ids": list(settings.full_attention_layers),
        SAVED_BLOCK: dataclasses.asdict(settings)
        | {f"base_{name}": base_config[name] for name in TYPED if name in base_config},
        BASE_NAME: base_name,
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
    }


def base_config(config: dict[str, Any]) -> dict[str, Any]:
    """The base model's own configuration: without settings of an AHN and what the published trainer left behind."""
    block = config.get(SAVED_BLOCK)
    if config.get("model_type") == MODEL_TYPE and isinstance(block, dict):
        config = {name: value for name, value in config.items() if name not in TYPED}
        config |= {name: block[key] for name in TYPED for key in (name, f"base_{name}") if key in block}
    dropped = {SAVED_BLOCK, BASE_NAME, *STRUCTURE, *TRAINING}
    kept = {name: value for name, value in config.items() if name not in dropped}
    if PUBLISHED_NAME in config and SAVED_BLOCK not in config:
        # Published: its window and its modeling file are the trainer's, the base model has neither.
        kept = {name: value for name, value in kept.items() if name not in ("auto_map", "layer_types")}
        kept |= {"use_sliding_window": False, "sliding_window": None}
        ordinary = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kept.get("model_type"))
        if ordinary and not any(hasattr(transformers, name) for name in kept.get("architectures") or ()):
            kept["architectures"] = [ordinary]
    return kept


def base_reference(base: str | os.PathLike[str], directory: Path) -> str:
    """How a checkpoint in `directory` names its base: a Hub id as it is, a directory beside it by a relative path."""
    path = expanded(base)
    if not path.is_dir():
        return str(base)
    path, directory = path.resolve(), directory.resolve()
    if path.is_relative_to(directory.parent):
        relative = Path(os.path.relpath(path, directory)).as_posix()
        return relative if relative.startswith("..") else f"./{relative}"
    return str(path)

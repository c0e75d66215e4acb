"""An attached AHN to and from a directory of its own, in the published layout."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel

from ahn.checkpoint.directory import CONFIG, INDEX, WEIGHTS, Checkpoint, short_name
from ahn.checkpoint.format import check_base, read_settings, report_window
from ahn.checkpoint.hub import local_directory
from ahn.checkpoint.validate import check_tensors, expected_shapes, finite_tensors
from ahn.config import AHNConfig, Reach
from ahn.errors import AHNError, check_path
from ahn.files import check_folder, expanded, read_json, write_json, write_tensors
from ahn.memory.key_basis import REMEDY, SAVE_ANOTHER, check_bases
from ahn.model.adapter import adapter_parameters, attach, detach
from ahn.model.saving import saved_config
from ahn.shape import ModelShape
from ahn.wrappers import attached, unwrapped

PathLike = str | os.PathLike[str]
RESULTS = "results.json"
"""What a training run writes of its numbers beside the adapter."""


def save_adapter(model: PreTrainedModel, directory: PathLike) -> Path:
    """Write the AHN of a model, without the base weights, as `config.json` and `model.safetensors`.

    Tensors keep their dtype. The configuration holds the base model's, every field of `model.ahn_config`, and where the
    base came from: its Hub id, or its directory (as a relative path when both lie in one parent, so they can move
    together). An adapter already in `directory` is replaced.

    Returns:
        The directory.

    Raises:
        AHNError: the model has no AHN, its memory has no parameters or such as would not load again, or `directory`
            holds another model.
    """
    check_path(directory)
    path = expanded(directory)
    model = attached(model)
    parameters = adapter_parameters(model)
    model._ahn.share.check_whole("Saving an adapter", "save it from a model that was loaded without tp_plan")
    settings = model.ahn_config
    if not parameters:
        raise AHNError(f"The memory {settings.memory!r} has no parameters: attach() recreates it without a file.")
    marks = (".lora_", ".base_layer.", ".modules_to_save.")
    if adapted := [name for name in parameters if any(mark in name for mark in marks)]:
        raise AHNError(
            f"PEFT has adapted the memory itself ({adapted[0]}), which has no file of its own for that: give PEFT "
            r"exclude_modules=r'.*\.ahn\..*', which leaves the memory alone."
        )
    wanted = expected_shapes(ModelShape.from_config(model.config), settings)
    if unlike := sorted(wanted.items() ^ {short_name(name): tuple(p.shape) for name, p in parameters.items()}.items()):
        raise AHNError(
            f"The memory's parameters are not what {settings.memory!r} has ({unlike[0][0]}), so their file would not "
            "load: undo what was put on its modules (weight_norm, pruning, …) before it is saved."
        )
    if packed := [name for name, parameter in parameters.items() if type(parameter.data) is not torch.Tensor]:
        raise AHNError(
            f"{packed[0]} is a {type(parameters[packed[0]].data).__name__}, no plain tensor, and would not load: save "
            "the adapter before the model is quantized, or quantize the base alone."
        )
    if broken := [name for name, parameter in parameters.items() if not bool(parameter.isfinite().all())]:
        raise AHNError(f"{broken[0]} holds NaN or infinite values, the memory is unusable and is not saved.")
    check_bases(
        {short_name(name): p.detach() for name, p in parameters.items()}, "The adapter is not saved", SAVE_ANOTHER
    )
    occupied = (path / INDEX).exists() or (path / WEIGHTS).exists()
    if occupied and Checkpoint.open(path).kind != "adapter":
        raise AHNError(f"{path} holds the weights of another model: choose another directory.")
    check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    write_tensors(path / WEIGHTS, tensors, {"format": "pt"})
    write_json(path / CONFIG, saved_config(model, path))
    return path


def load_adapter(
    model: PreTrainedModel,
    directory: PathLike,
    window: int | None = None,
    sinks: int | None = None,
    quantized: int | None = None,
    max_distance: int | None = None,
) -> PreTrainedModel:
    """Attach an AHN with the settings and weights of an adapter. An AHN already on the model is replaced.

    Weights take the base model's dtype, on the device of their layer: float32 stays float32 only on a float32 base.

    Args:
        model: a loaded causal language model, the kind of model that the adapter was trained on.
        directory: adapter directory or Hub id, ours or published.
        window: window to use. Default: the saved one; for published adapters 32640, never their `sliding_window`.
        sinks: likewise; for published adapters 128.
        quantized: likewise; for published adapters 0.
        max_distance: likewise; for published adapters 0, the published placing of sinks.

    Returns:
        The same model object.

    Raises:
        AHNError: base and adapter do not fit, a tensor is missing, extra, of the wrong shape or not finite, or a file
            is missing or damaged. The model is then as it was.
    """
    inner = unwrapped(model)
    checkpoint = Checkpoint.open(local_directory(directory)).require("adapter")
    name = inner.name_or_path or type(inner).__name__
    reach: Reach = {"window": window, "sinks": sinks, "quantized": quantized, "max_distance": max_distance}
    settings = checked_settings(checkpoint, inner.config, name, **reach)
    attach_checked(inner, checkpoint, settings, given=window is not None and sinks is not None)
    return model


def checked_settings(checkpoint: Checkpoint, base: Any, name: str, **reach: Unpack[Reach]) -> AHNConfig:
    """The settings of the AHN in a checkpoint, which fits the configuration `base` of a model called `name`."""
    shape = check_base(checkpoint, base, name)
    settings = read_settings(checkpoint, **reach)
    check_tensors(checkpoint, shape, settings)
    return settings


def attach_checked(model: PreTrainedModel, checkpoint: Checkpoint, settings: AHNConfig, given: bool) -> PreTrainedModel:
    """Attach the AHN of an adapter or of a merged checkpoint, with the settings from `checked_settings`.

    Args:
        given: whether the caller chose both window and sinks.
    """
    weights = dict(finite_tensors(checkpoint))
    check_bases(weights, str(checkpoint.path), REMEDY)
    report_window(checkpoint, settings, given)
    if hasattr(model, "ahn_config"):
        detach(model)
    dtype = model.dtype
    attach(model, settings)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            own = model._ahn.share.of_parameter(weights[short_name(name)], parameter.shape)
            parameter.data = own.to(parameter.device, dtype)
    with contextlib.suppress(AHNError):  # beside most adapters there is none
        measured = read_json(checkpoint.path / RESULTS).get("after")
        model._ahn.measured = measured if isinstance(measured, dict) else None
    return model

"""The model that is measured: real weights, or random ones of the same shape made where they are needed."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ahn.bench.shapes import SHAPES, configuration
from ahn.checkpoint import shipped
from ahn.checkpoint.directory import CONFIG
from ahn.checkpoint.format import check_kernels
from ahn.checkpoint.hub import config_file, local_directory
from ahn.checkpoint.loading import load_base
from ahn.errors import AHNError, first_line
from ahn.files import expanded, read_json


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """A base model without a memory, in evaluation mode.

    Attributes:
        random: its weights mean nothing.
    """

    name: str
    model: PreTrainedModel
    random: bool


def config_of(name: str) -> Any:
    """The configuration of the model called `name`, as `load` takes it."""
    if name in SHAPES:
        return configuration(name)
    path = expanded(shipped.resolve(name))
    if not path.exists() and "/" not in name:
        raise AHNError(
            f"There is no shape, file or directory {name!r}; shapes are {', '.join((*SHAPES, *shipped.NAMES))}, and an "
            "id on the Hub has an owner (Qwen/Qwen2.5-3B-Instruct)."
        )
    try:
        file = path / CONFIG if path.is_dir() else path if path.exists() else config_file(name)
        check_kernels(read_json(file), file)
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unusable(name, error) from error


def load(name: str, random_weights: bool, device: torch.device, dtype: torch.dtype) -> BenchModel:
    """The model called `name`.

    Args:
        name: a name in `SHAPES`, one in `shipped.NAMES`, a config.json, or a directory or Hub id.
        random_weights: of the last two, take only the shape. The first and the third have no weights anyway.
    """
    config, path = config_of(name), expanded(shipped.resolve(name))
    if name in SHAPES or path.is_file() or random_weights:
        label = path.parent.name if path.name == "config.json" else path.stem if path.is_file() else Path(name).name
        return BenchModel(label, build(config, device, dtype), True)
    try:
        model = load_base(path if path.is_dir() else local_directory(name), dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        raise _unusable(name, error) from error
    return BenchModel(Path(name).name, _ready(model), False)


def _unusable(name: str, error: Exception) -> AHNError:
    shapes = ", ".join(SHAPES)
    return AHNError(f"Cannot load {name!r}; the shapes that need no files are {shapes}. {first_line(error)}")


def build(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on the device: nothing passes through the host's memory."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config.get_text_config(decoder=True), dtype=dtype)
    return _ready(model)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    # Greedy, and without an end token: a random model must not stop early.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval().requires_grad_(False)

"""Checkpoints of a run: an adapter in float32 and everything that makes the next step the same as without the break.

`checkpoint-N` holds `config.json` and `model.safetensors` (an adapter that loads as it is), `optimizer.safetensors`,
`rng-RANK.safetensors`, `trainer_state.json` and `training.json`. It is written under another name, which begins with a
dot, and renamed when it is whole: a killed run leaves its last good checkpoint.
"""

import json
import logging
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ahn.checkpoint.directory import CONFIG, WEIGHTS, Checkpoint, short_name
from ahn.checkpoint.format import read_settings
from ahn.checkpoint.validate import check_tensors, finite_tensors
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.files import read_json, write_json, write_tensors
from ahn.model.adapter import adapter_parameters
from ahn.model.saving import saved_config
from ahn.shape import ModelShape
from ahn.training.settings import PUBLISHED

logger = logging.getLogger("ahn")

OPTIMIZER = "optimizer.safetensors"
TRAINING = "training.json"
STATE = "trainer_state.json"
RNG = "rng-{}.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


def folder(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output / f"checkpoint-{step}"


def partial(output: Path, step: int) -> Path:
    """Where it is written."""
    return output / f".checkpoint-{step}.partial"


def numbered(output: Path) -> list[Path]:
    """Every checkpoint of a run, the latest first; some may be damaged."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def last_good(output: Path) -> Path | None:
    """The latest checkpoint that is whole; says which ones are not."""
    for path in numbered(output):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is left aside: %s", path, problem)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        Checkpoint.open(path).require("adapter")
        for name in (STATE, TRAINING):
            read_json(path / name)
        for file in (path / OPTIMIZER, path / RNG.format(0)):
            with safe_open(file, "pt"):
                pass
    except (AHNError, OSError, SafetensorError) as error:
        return str(error)
    return None


def clear_partial(output: Path) -> None:
    """Delete what was being written or deleted when an earlier run was killed."""
    remove(output.glob(".checkpoint-*.partial"))


def remove(paths: Iterable[Path]) -> None:
    """Delete checkpoints. Each loses its name first, so that one half deleted is not taken for a good one.

    The name it gets is not that of `partial`: the checkpoint that takes its place lies there already.
    """
    for path in paths:
        doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.old.partial")
        if path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU; gathered from all ranks if it is sharded, so every rank must ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def write_memory(model: PreTrainedModel, config: AHNConfig, path: Path | None, dtype: torch.dtype) -> None:
    """The memory as an adapter, which `ahn.save_adapter` cannot take from a sharded model.

    Gathered on every rank, written where path is.
    """
    parameters = adapter_parameters(model)
    tensors = {f"model.{short_name(name)}": whole(parameter).to(dtype) for name, parameter in parameters.items()}
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / WEIGHTS, tensors, {"format": "pt"})
        write_json(path / CONFIG, saved_config(model, path, config))


def load_memory(model: PreTrainedModel, path: Path) -> None:
    """The memory's parameters from a checkpoint, in float32 whatever the base's precision."""
    checkpoint = Checkpoint.open(path).require("adapter")
    saved, own = read_settings(checkpoint), model.ahn_config
    differing = [
        name
        for name in ("memory", "router", "q_proj", "full_attention_layers")
        if getattr(saved, name) != getattr(own, name)
    ]
    if differing:
        raise AHNError(f"{path} was trained with another {', '.join(differing)}; resume with the same settings.")
    check_tensors(checkpoint, ModelShape.from_config(model.config), own)
    weights = dict(finite_tensors(checkpoint))
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if not parameter.is_meta:  # FSDP lets the first rank alone hold weights before it shards them
                parameter.copy_(weights[short_name(name)])


def write_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], path: Path | None) -> None:
    """The state of every parameter as tensors named `parameter/what`; gathered on every rank, written where path is."""
    tensors = {
        f"{names[parameter]}/{what}": whole(torch.as_tensor(value)).clone()
        for parameter, state in optimizer.state.items()
        for what, value in state.items()
    }
    if path is not None:
        save_file(tensors, path / OPTIMIZER)


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], path: Path) -> None:
    """What `write_optimizer` wrote, sharded as the parameters are."""
    stored = load_file(path / OPTIMIZER)
    own: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        name, _, what = key.rpartition("/")
        own.setdefault(name, {})[what] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if set(own) != {names[p] for p in parameters}:
        raise AHNError(
            f"{path / OPTIMIZER} is of other parameters than this run trains; resume with the same settings."
        )
    state = {
        number: {what: _placed(value, p) for what, value in own[names[p]].items()}
        for number, p in enumerate(parameters)
    }
    # Through load_state_dict, which knows where each optimizer wants its numbers; learning rates stay the schedule's.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        local = value.to(parameter.to_local().device)
        return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def write_rng(path: Path, rank: int) -> None:
    """The state of every random number generator of this process."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    rest = {"python": [version, gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}
    save_file(tensors, path / RNG.format(rank), metadata={"rest": json.dumps(rest)})


def load_rng(path: Path, rank: int) -> None:
    """What `write_rng` wrote; with another number of processes than before, a new rank keeps its own state."""
    file = path / RNG.format(rank)
    if not file.exists():
        logger.warning("%s has no random state for rank %d; it goes on with its own.", path, rank)
        return
    with safe_open(file, "pt") as content:
        rest = json.loads(content.metadata()["rest"])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (no mapping)
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])


def read_run_settings(path: Path) -> dict[str, Any]:
    """The settings that a checkpoint notes."""
    settings: dict[str, Any] = read_json(path / TRAINING)["settings"]
    # Without a value, or without the name, it is of a time when the published start was the default.
    return settings | {"memory_horizons": settings.get("memory_horizons") or PUBLISHED}


def changed_settings(before: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Settings that differ from those before, as `name: before → now`."""
    return [f"{name}: {before[name]} → {value}" for name, value in settings.items() if before.get(name, value) != value]

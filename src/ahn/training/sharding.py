"""How weights are divided between processes: by FSDP2, also where a launcher or a DeepSpeed file says it their way."""

import json
import os
from pathlib import Path
from typing import Any

from ahn.errors import AHNError, first_line

TRUE = ("true", "1", "yes", "t", "y")


def shard(values: dict[str, Any]) -> list[str]:
    """Shard weights by FSDP2, also where a ZeRO configuration asks for it; returns notes for the user."""
    notes = []
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    config = values.pop("deepspeed", None)
    if config is not None:
        stage = _zero_stage(config)
        if stage == 3 and distributed:
            values["fsdp"] = True
        how = "FSDP2" if stage == 3 and distributed else "plain data parallelism: only the memory has optimizer state"
        notes.append(f"ZeRO stage {stage} becomes {how}")
    if is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise AHNError("accelerate's configuration asks for DeepSpeed; use configs/accelerate/fsdp2.yaml instead.")
    if is_true(os.environ.get("ACCELERATE_USE_FSDP")) and os.environ.get("FSDP_VERSION") != "2":
        raise AHNError("accelerate's configuration asks for FSDP 1; set fsdp_version: 2.")
    if is_true(values.get("fsdp")):
        if not distributed:
            raise AHNError("fsdp needs several processes: torchrun --nproc_per_node 8 --no-python ahn train …")
        values.setdefault("fsdp_config", {"cpu_ram_efficient_loading": True})
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # transformers looks here when it loads the weights
    if values.get("ddp_backend") is not None and not distributed:
        values.pop("ddp_backend")
        notes.append("ddp_backend changes nothing in a single process")
    return notes


def _zero_stage(config: Any) -> int:
    try:
        content = config if isinstance(config, dict) else json.loads(Path(str(config)).read_text(encoding="utf-8"))
        return int(content["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AHNError(
            f"Cannot read a ZeRO stage from the DeepSpeed configuration {config}: {first_line(error)}; leave "
            "--deepspeed out, --fsdp true shards the weights."
        ) from error


def recomputes() -> bool:
    """FSDP was told to recompute activations itself."""
    return is_true(os.environ.get("FSDP_ACTIVATION_CHECKPOINTING"))


def is_true(value: Any) -> bool:
    """Whether a flag or an environment variable says yes."""
    return str(value).lower() in TRUE

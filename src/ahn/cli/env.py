"""`ahn env`: versions and devices, as a bug report needs them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from ahn.cli import common
from ahn.cli.common import JsonOption

PACKAGES = ("ahn", "torch", "transformers", "safetensors", "tokenizers", "huggingface-hub", "triton")


def command(as_json: JsonOption = False) -> None:
    """Print versions, devices, the ops backend and thread counts of this installation."""
    found = environment()
    if as_json:
        common.print_json(found)
    else:
        common.print_pairs(_rows(found))


def environment() -> dict[str, Any]:
    """The same facts as data: JSON types only. A package that is not installed has version None."""
    import torch

    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "ops": _ops_backends(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _ops_backends() -> dict[str, str]:
    """What computes the memory on the best device, in inference and in training."""
    from ahn import ops
    from ahn.checkpoint.loading import pick_device

    if pick_device(None).type != "cuda":
        used = "chunked"
    else:
        used = "ahn's kernels" if ops.has_triton() else "no kernels: they need Triton and a C compiler (gcc)"
    return {"inference": used, "training": used}


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    versions = [(name, version or "not installed") for name, version in found["packages"].items()]
    return [
        *versions,
        ("python", f"{found['python']} on {found['platform']}"),
        *(("device", device) for device in found["devices"]),
        ("cuda", found["cuda"] or "not in this build of torch"),
        *((f"ops, {use}", backend) for use, backend in found["ops"].items()),
        ("threads", f"{found['threads']} of {found['cpus']} CPUs"),
    ]

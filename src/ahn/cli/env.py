"""`ahn env`: versions and devices, as a bug report needs them."""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from ahn.cli import common
from ahn.errors import installed_version

PACKAGES = ("ahn", "torch", "transformers", "safetensors", "tokenizers", "huggingface-hub", "numpy", "triton")
OPTIONAL = ("accelerate", "datasets", "peft", "lm-eval", "jieba", "gguf", "fastapi", "uvicorn", "llguidance")
VARIABLES = (
    *("CC", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TORCHDYNAMO_DISABLE", "TRANSFORMERS_OFFLINE", "TRITON_INTERPRET"),
)
"""What changes a run and holds no secret: no other variable of the environment is printed."""


def command(as_json: common.JsonOption = False) -> None:
    """Print what a bug report needs: versions, how ahn was installed, devices, the ops backend, settings."""
    found = environment()
    if as_json:
        common.print_json(found)
    else:
        common.print_pairs(_rows(found))


def environment() -> dict[str, Any]:
    """The same facts as data: JSON types only. A package that is not installed has version None."""
    import torch

    return {
        "packages": {name: installed_version(name) for name in (*PACKAGES, *OPTIONAL)},
        "installed": _installation(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "encoding": f"{sys.getfilesystemencoding()}, standard output {getattr(sys.stdout, 'encoding', None)}",
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "ops": _ops_backends(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _installation() -> str:
    """In which way ahn came here; no paths, which may name people."""
    try:
        own = importlib.metadata.distribution("ahn")
    except importlib.metadata.PackageNotFoundError:
        return "sources on the path"
    source = json.loads(own.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        return "editable, from a checkout"
    if not Path(__file__).is_relative_to(Path(str(own.locate_file("")))):
        return "sources on the path, not the installed package"
    return "from a file or repository" if source else "from a package index"


def _memory_gib() -> float | None:
    """Of the machine; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(f"cuda:{index} {properties.name}, {size}, compute {properties.major}.{properties.minor}")
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
    versions = found["packages"]
    return [
        *((name, versions[name] or "not installed") for name in PACKAGES),
        *((name, versions[name]) for name in OPTIONAL if versions[name]),
        ("installed", found["installed"]),
        ("python", f"{found['python']} on {found['platform']}"),
        ("encoding", found["encoding"]),
        *(("device", device) for device in found["devices"]),
        ("cuda", found["cuda"] or "not in this build of torch"),
        *((f"ops, {use}", backend) for use, backend in found["ops"].items()),
        ("threads", f"{found['threads']} of {found['cpus']} CPUs"),
        ("memory", "unknown" if found["memory_gib"] is None else f"{found['memory_gib']} GiB"),
        *found["variables"].items(),
    ]

"""`ahn env` tells the truth about this installation."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ahn import ops


def test_json_holds_what_a_bug_report_needs(ahn_cli: Any) -> None:
    result = ahn_cli("env", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    for package in ("ahn", "torch", "transformers", "safetensors"):
        assert found["packages"][package] == importlib.metadata.version(package)
    assert found["python"] == platform.python_version()
    assert found["devices"][0] == "cpu"
    assert len(found["devices"]) >= 1 + torch.cuda.device_count()
    kernels = torch.cuda.is_available() and ops.has_triton()
    assert all(("ahn's kernels" in used) == kernels for used in found["ops"].values())
    assert found["ops"].keys() == {"inference", "training"}
    assert found["threads"] == torch.get_num_threads()


def test_text_names_absent_packages(ahn_cli: Any, monkeypatch: Any) -> None:
    def version(package: str) -> str:
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = [line.split() for line in ahn_cli("env").out.splitlines()]
    assert ["triton", "not", "installed"] in lines
    assert ["torch", "1.2.3"] in lines


def test_it_says_how_it_was_installed_and_no_secrets(ahn_cli: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = ahn_cli("env", "--json")
    found = json.loads(result.out)
    assert "hf_secret" not in result.out and found["variables"]["OMP_NUM_THREADS"] == "1"
    assert str(Path.home()) not in found["installed"] and found["installed"]
    assert found["packages"]["accelerate"] == importlib.metadata.version("accelerate")
    assert found["memory_gib"] > 0

    def missing(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert json.loads(ahn_cli("env", "--json").out)["installed"] == "sources on the path"

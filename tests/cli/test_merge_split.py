"""`ahn merge` and `ahn split`: there and back, exit codes, and output that can be piped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import speaking
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> speaking.Speaking:
    return speaking.save(tmp_path_factory.mktemp("parts"))


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_there_and_back(ahn_cli: Any, parts: speaking.Speaking, tmp_path: Path) -> None:
    merged, apart = tmp_path / "merged", tmp_path / "apart"
    done = ahn_cli("merge", "--base-model", parts.base, "--ahn-path", parts.adapter, "--output-path", merged, "--json")
    result = json.loads(done.out)
    stored = sum(len(x.numpy().tobytes()) for file in merged.glob("*.safetensors") for x in load_file(file).values())
    assert (done.code, result["output"], result["bytes"]) == (0, str(merged), stored)

    split = ahn_cli("split", "--model", merged, "--output-path", apart)
    assert split.code == 0
    assert f"Wrote {apart / 'base'} and {apart / 'adapter'}" in split.out
    assert same(parts.base, apart / "base") and same(parts.adapter, apart / "adapter")

    texts = [
        ahn_cli("generate", "--model", model, "--prompt", "def main():" * 5, "--max-new-tokens", 8).out
        for model in (parts.adapter, merged, apart / "adapter")
    ]
    assert texts[0] and texts.count(texts[0]) == 3


def test_faults_are_one_line(ahn_cli: Any, parts: speaking.Speaking, tmp_path: Path) -> None:
    swapped = ahn_cli("merge", "--base-model", parts.adapter, "--ahn-path", parts.base, "--output-path", tmp_path / "x")
    assert (swapped.code, swapped.out) == (1, "")
    assert swapped.err.count("\n") == 1 and "adapter" in swapped.err
    taken = ahn_cli("split", "--model", parts.base, "--output-path", tmp_path / "y")
    assert taken.code == 1 and "expected a merged checkpoint" in taken.err
    assert list(tmp_path.iterdir()) == []
    assert ahn_cli("merge", "--base-model", parts.base).code == 2

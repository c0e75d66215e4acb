"""Adapters and configurations that somebody else wrote, or that a disk has damaged: they load, or one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hostile import mutated_bytes, mutated_json
from tiny_checkpoints import logits

from ahn import AHNError, from_pretrained
from ahn.checkpoint import merge

MUTATIONS = 200


def mutate(file: Path, seed: int) -> str:
    """Bytes of a file, or one of its values if it is JSON; says what."""
    content = file.read_bytes()
    if file.suffix != ".json" or seed % 4 == 0:
        file.write_bytes(mutated_bytes(content, seed))
        return "bytes"
    value = json.loads(content)
    what = mutated_json(value, seed)
    file.write_text(json.dumps(value))
    return what


def outcome(folder: Path, base: Path | None) -> str:
    try:
        model = from_pretrained(folder) if base is None else from_pretrained(folder, base=base)
        assert logits(model).shape[-1] > 0
        return "loads"
    except AHNError as error:
        assert len(str(error)) < 1000
        return "refused"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["adapter config.json", "adapter model.safetensors", "merged config.json"])
def test_mutated_files(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """Never a traceback, nor the memory that a number in it asks for. A flipped bit of a weight is another weight."""
    kind, file = name.split()
    source = adapter if kind == "adapter" else merge(base, adapter, tmp_path / "merged")
    outcomes = {"refused": 0, "loads": 0}
    for seed in range(MUTATIONS):
        folder = Path(shutil.copytree(source, tmp_path / "mutant"))
        what = mutate(folder / file, seed)
        try:
            outcomes[outcome(folder, base if kind == "adapter" else None)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {what}")
            raise
        shutil.rmtree(folder)
    assert sum(outcomes.values()) == MUTATIONS and outcomes["refused"] > 0.2 * MUTATIONS, outcomes

"""A memory that was added as docs/add-a-memory.md says: the tests take it up by its name, and it passes them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import relative_error
from models import awaken, base, positions
from support.documents import blocks
from support.turns import padded

import ahn
from ahn import memory
from ahn.memory.deltanet import DeltaNet

ROOT = Path(__file__).parents[2]
FOLDERS = ("memory", "layout", "cache", "decode", "model", "checkpoint", "inspect")


@pytest.mark.slow
def test_the_memory_of_the_document_passes_all_tests_of_memories(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    first = next(block for block in blocks(ROOT / "docs" / "add-a-memory.md") if block.language == "python")
    (tmp_path / "src" / "ahn" / "memory" / "linear_attention.py").write_text(first.code, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-m", "", "-x", "-p", "no:cacheprovider", "-k", "linear_attention"]
    done = subprocess.run(
        [*command, *(str(ROOT / "tests" / folder) for folder in FOLDERS)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20, done.stdout[-300:]


def test_a_copied_memory_needs_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a checkpoint of one would be loaded as the other. A class comes twice if a notebook's cell is run again."""

    def registry(*found: tuple[str, str, str]) -> list[str]:
        classes = [type(kind, (), {"name": name, "published_name": published}) for kind, name, published in found]
        monkeypatch.setattr(memory.Memory, "__subclasses__", lambda: classes)
        return list(memory.registry._registry.__wrapped__())

    theirs = ("Delta", "deltanet", "DeltaNet")
    for field, mine in (("name", ("Mine", "deltanet", "Mine")), ("published_name", ("Mine", "mine", "DeltaNet"))):
        with pytest.raises(ahn.AHNError, match=rf"Two memories have the {field} '\w+', .*\.Delta and .*\.Mine"):
            registry(theirs, mine)
    assert registry(theirs, ("Mine", "mine", "Mine"), ("Mine", "mine", "Mine")) == ["deltanet", "mine"]


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_memory_that_does_not_begin_with_zeros(use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of which nothing was written reads nothing, alone and beside a longer one."""
    start = torch.randn(4, 16, 16)
    monkeypatch.setattr(DeltaNet, "init_state", lambda self, batch, device: {"state": start.expand(batch, -1, -1, -1)})
    monkeypatch.setattr(DeltaNet, "step_rule", lambda self: None)
    model = awaken(ahn.attach(base(), ahn.AHNConfig(memory="deltanet", window=6, sinks=2)))
    ids, mask, rows = padded([[25, 14], [1, 1]])
    found = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=use_cache).logits
    for row, own in enumerate(rows):
        alone = model(own[None]).logits
        assert relative_error(found[row, mask[row].bool()], alone[0]) < 1e-4
    assert torch.equal(model(rows[1][None, :8]).logits, base()(rows[1][None, :8]).logits)

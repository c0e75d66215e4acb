"""A memory that was added as docs/add-a-memory.md says: the tests take it up by its name, and it passes them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import blocks

ROOT = Path(__file__).parents[2]
FOLDERS = ("memory", "layout", "cache", "decode", "model", "checkpoint", "inspect")


@pytest.mark.slow
def test_the_memory_of_the_document_passes_all_tests_of_memories(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    first = next(block for block in blocks(ROOT / "docs" / "add-a-memory.md") if block.language == "python")
    (tmp_path / "src" / "ahn" / "memory" / "linear_attention.py").write_text(first.code, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "linear_attention"]
    done = subprocess.run(
        [*command, *(str(ROOT / "tests" / folder) for folder in FOLDERS)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20, done.stdout[-300:]

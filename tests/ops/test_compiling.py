"""Kernels of training and of several tokens at once, heads of 128, compile for GPUs that are not there and fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
OF_SEVERAL_TOKENS = {
    "attend_and_write",
    "join_and_keep",
    "_gather",
    "_keep",
    "_products",
    "_partial_products",
    "_sum_and_norm",
}


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared_memory"), [(89, 99 * 1024), (90, 227 * 1024)], ids=["RTX 4090", "H100"])
def test_shared_memory(capability: int, shared_memory: int) -> None:
    pytest.importorskip("triton")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "support.compiling", str(capability), str(shared_memory)]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = json.loads(done.stdout.splitlines()[-1])
    of_training = {"_add_read", "_add_read_backward", "_forward", "_backward_keys", "_states"}
    assert of_training | OF_SEVERAL_TOKENS <= set(wanted)
    assert max(wanted.values()) <= shared_memory, wanted

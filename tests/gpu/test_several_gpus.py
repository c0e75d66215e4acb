"""A model over two GPUs against the same model on one: by layers in eager chunks, a live cache, steps, `generate`; by
heads and in training as `benchmarks/several_gpus` has it, small.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import private

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
LAYERS, LENGTH = 4, 200
ROOT = Path(__file__).parents[2]
SMALL = {
    "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 512,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def pair(memory: str, quantized: int, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """On one GPU, and half of the layers on each of two."""
    shape = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}
    config = ahn.AHNConfig(memory=memory, window=48, sinks=16, quantized=quantized, prefill_chunk_size=32)
    base = models.base("qwen3", initializer_range=0.05, **shape)
    one = models.awaken(ahn.attach(base.to(dtype), config))
    two = copy.deepcopy(one)
    devices: dict[str, Any] = {f"model.layers.{i}": int(i >= LAYERS // 2) for i in range(LAYERS)}
    devices |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    return one.to("cuda:0"), dispatch_model(two, devices, skip_keys=private.CACHE)


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Of a prompt in chunks, a second one on the live cache, and three steps, (B, LENGTH, V)."""
    cache, found = ahn.AHNCache.for_model(model), []
    for start, stop in ((0, 150), (150, LENGTH - 3), *((i, i + 1) for i in range(LENGTH - 3, LENGTH))):
        own = None if mask is None else mask[:, :stop]
        found.append(model(ids[:, start:stop], attention_mask=own, past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def away(found: Tensor, from_: Tensor) -> float:
    return float((found.float() - from_.float()).norm() / from_.float().norm())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [0, 32])
@pytest.mark.parametrize("memory", ["gated_deltanet", "mamba2", "window_only"])
@torch.no_grad()
def test_two_gpus_give_what_one_gives(memory: str, quantized: int, dtype: torch.dtype, padded: bool) -> None:
    one, two = pair(memory, quantized, dtype)
    ids, mask = models.tokens(2, LENGTH).to("cuda:0"), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
    expected, found = logits(one, ids, mask), logits(two, ids, mask)
    assert found.device == expected.device
    # One GPU replays captured steps and fuses small passes, two do neither: equal to rounding.
    if dtype == torch.float32:
        assert away(found, expected) < 1e-4
    else:  # what is rounded elsewhere is as far from the truth
        exact = logits(copy.deepcopy(one).float(), ids, mask)
        assert away(found, exact) < 1.5 * away(expected, exact)


@pytest.mark.parametrize("quantized", [0, 32])
@pytest.mark.parametrize("memory", ["gated_deltanet", "mamba2", "window_only"])
@torch.no_grad()
def test_generate(memory: str, quantized: int) -> None:
    one, two = pair(memory, quantized, torch.float32)
    ids = models.tokens(2, 150).to("cuda:0")
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    out = [m.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False) for m in (one, two)]
    torch.testing.assert_close(out[1], out[0], rtol=0, atol=0)


def measured(tmp_path: Path, parts: str, *more: str) -> dict[str, dict[str, Any]]:
    """What the parts of the benchmark found, in processes of their own."""
    shape = tmp_path / "small.json"
    shape.write_text(json.dumps(SMALL))
    command = [sys.executable, str(ROOT / "benchmarks" / "several_gpus"), "--model", str(shape), "--length", "2048"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        [*command, "--only", parts, *more],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    return {line["part"]: line for line in lines if "took_s" in line}


@pytest.mark.parametrize("memory", ["gated_deltanet", "mamba2", "window_only"])
def test_heads_in_two_processes(memory: str, tmp_path: Path) -> None:
    """In ordinary steps and in captured ones: as far from one GPU as its own two kinds of steps are from each other."""
    found = measured(tmp_path, "one,heads", "--memory", memory)
    for way in ("ordinary", "captured"):
        assert found["heads"][way]["heads"] * torch.cuda.device_count() == 8
        assert found["heads"][way]["logits_apart"] < 0.05
        assert found["heads"][way]["same_tokens"] >= found["one"]["ordinary"]["same_tokens"] - 0.2
    assert found["heads"]["captured"]["same_tokens"] > 0.5


def test_training_in_two_processes(tmp_path: Path) -> None:
    """Compiled leaves under DDP and under FSDP2: the losses of one GPU."""
    found = measured(tmp_path, "ddp,fsdp2")
    for part in found.values():
        assert part["all"]["losses"] == pytest.approx(part["one"]["losses"], rel=0.02)
        assert part["fell_by"] > 0

"""Prompts on a GPU in bfloat16: the window as a rectangle and two triangles, at every boundary, in constant memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from models import awaken, base, tokens
from talk import Talk
from transformers import PreTrainedModel

import ahn
from ahn import ops
from ahn.attend import windowed
from ahn.model import route

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WINDOW, SINKS, CHUNK = 150, 10, 64
LOSSLESS = WINDOW + SINKS
# What each forward reads of a conversation; a prompt is read in chunks that end where the window is full.
TURNS = {
    "one token short of the window": [LOSSLESS - 1, 2, 60],
    "the window": [LOSSLESS, 2, 60],
    "one token more than the window": [LOSSLESS + 1, 2, 60],
    "chunks below and above": [30, 50, 300],
    "longer than the window at once": [LOSSLESS + 70, 2 * WINDOW, 3],
}


@pytest.fixture(autouse=True)
def _float32_scans() -> Iterator[None]:
    """So that attention alone is compared."""
    with ops.use_backend("chunked"):
        yield


@cache
def made() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A bfloat16 model on the GPU, and the same weights in float32 on the CPU."""
    plain = base(hidden_size=256, head_dim=128, initializer_range=0.08).bfloat16()
    model = awaken(ahn.attach(plain, ahn.AHNConfig(window=WINDOW, sinks=SINKS, prefill_chunk_size=CHUNK)))
    reference = copy.deepcopy(model).float()
    return model.cuda(), reference


@pytest.mark.parametrize("chunk", [CHUNK, 400], ids=["chunks", "blocks of the window"])
@pytest.mark.parametrize("turns", TURNS)
def test_bands_are_as_near_to_float32_as_a_mask(turns: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = made()
    used = {True: 0, False: 0}
    attend, errors = windowed.attend, []
    for banded in (True, False):

        def counted(*args: Any, banded: bool = banded) -> torch.Tensor:
            used[banded] += 1
            return attend(*args)

        with monkeypatch.context() as patch:
            patch.setattr(route, "SHORT", 0)
            patch.setattr(model, "ahn_config", model.ahn_config.replace(prefill_chunk_size=chunk))
            patch.setattr(windowed, "attend", counted)
            if not banded:
                patch.setattr(windowed, "applies", lambda view, query: False)
            talk = Talk(model, 2)
            for length in TURNS[turns]:
                talk.read([length, length])
        errors.append(talk.error(reference))
    assert used[True] > 0 and used[False] == 0
    # Parts of a window are rounded to bfloat16 before they are joined: one rounding more, of a dozen a layer.
    assert errors[0] < 1.5 * errors[1], errors


@pytest.mark.parametrize("memory", ["window_only", "retained"])
@pytest.mark.parametrize("quantized", [0, 200])
@pytest.mark.parametrize("turns", TURNS)
def test_a_short_window_is_as_near_to_float32_as_a_mask(
    turns: str, quantized: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = base(hidden_size=256, head_dim=64, initializer_range=0.08).bfloat16()
    config = ahn.AHNConfig(memory, WINDOW, SINKS, prefill_chunk_size=400, quantized=quantized, slots=64)
    model = awaken(ahn.attach(plain, config))
    reference, errors = copy.deepcopy(model).float(), []
    model = model.cuda()
    for short in (10**9, 0):
        with monkeypatch.context() as patch:
            patch.setattr(route, "SHORT", short)
            if not short:
                patch.setattr(windowed, "applies", lambda view, query: False)
            talk = Talk(model, 2)
            for length in TURNS[turns]:
                talk.read([length, length])
        errors.append(talk.error(reference))
    # Codes and scores that are rounded to the other side make single tokens differ.
    assert errors[0] < 2 * errors[1] + 2e-2, errors


@torch.no_grad()
def test_peak_memory_is_that_of_a_chunk() -> None:
    model, _ = made()
    peaks = []
    for length in (8 * LOSSLESS, 32 * LOSSLESS, 64 * LOSSLESS):  # the first brings workspaces along
        ids = tokens(1, length).cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = model(ids, logits_to_keep=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out
    keys_and_values = 2 * 2 * 2 * 128 * LOSSLESS * 2  # layers, both, heads, head dim, tokens, bytes
    assert peaks[1] > keys_and_values, "nothing was measured"
    # Besides, transformers makes a position of 8 bytes per token of the prompt.
    assert peaks[2] <= 1.001 * peaks[1] + 8 * 32 * LOSSLESS, peaks

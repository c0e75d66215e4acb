"""A memory that keeps tokens on a GPU: captured steps are ordinary ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden import relative_error
from models import awaken, base, tokens
from talk import Talk
from transformers import PreTrainedModel

import ahn
from ahn.decode import runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXACT: dict[str, Any] = {"key_bits": 16, "value_bits": 16}
FORMS: dict[str, dict[str, Any]] = {
    "exact, any distance": {**EXACT, "max_distance": 0},
    "exact, bounded": {**EXACT, "max_distance": 256},
    "codes, bounded": {"max_distance": 256},
    "behind a tier": {"max_distance": 512, "quantized": 48},
    "few heads": {"max_distance": 256, "slot_heads": ((1, 1),)},
    "one score": {"max_distance": 256, "passage": 4, "score_layer": 0},
}


def awake(architecture: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """64 tokens a head, eight of them in the block."""
    config = ahn.AHNConfig("retained", window=40, sinks=4, prefill_chunk_size=64, slots=64, **options)
    return awaken(ahn.attach(base(architecture, hidden_size=256, head_dim=64).to(dtype), config)).cuda()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_captured_steps_are_ordinary_ones(form: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a padded batch, until tokens were forgotten and far ones seen elsewhere; float32.

    A step in which a code, a scale or a score has rounded to the other side is excused, and both ways go on from the
    same cache.
    """
    talks = [Talk(awake(architecture, torch.float32, **FORMS[form]), 2)]
    talks.append(Talk(talks[0].model, 2))
    excused = 0
    for step in range(301):
        for talk, captured in zip(talks, (True, False), strict=True):
            with monkeypatch.context() as patch:
                if not captured:
                    patch.setattr(runner, "on_gpu", lambda ids: False)
                talk.read((1, 1) if step else (30, 17))
        found, expected = (torch.cat([row[-1] for row in talk._logits]) for talk in talks)
        if relative_error(found, expected) >= 1e-4:
            excused += 1
            talks[1].cache = copy.deepcopy(talks[0].cache)
    assert talks[0].cache.captured is not None and talks[1].cache.captured is None
    # Exact tokens have scores alone to round: 1 200 of them, each within 1e-6 of the edge of its 2^-8 wide place.
    assert excused <= (2 if "exact" in form else 20)


@torch.no_grad()
def test_half_precision_generates() -> None:
    model = awake("qwen3", torch.bfloat16)
    output = model.generate(tokens(1, 300).cuda(), max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert output.sequences.shape == (1, 340)
    assert output.past_key_values.captured is not None

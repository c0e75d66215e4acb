"""Captured steps with a memory that keeps tokens are ordinary ones: blocks fill and places move between two steps.

The models compute in float64, as in `test_decode_quantized`.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from captured import EVENTS, LOSSLESS, SINKS, TOLERANCE, WINDOW, Graphs, converse
from golden import relative_error
from models import adapted
from support.turns import assert_same_layers
from talk import Talk
from transformers import PreTrainedModel

from ahn.decode import runner
from ahn.decode.retained import RetainedSteps
from ahn.layout.evicted import Evicted
from ahn.memory.retained_tokens import RetainedTokens

BLOCKS = 12
"""Blocks of two tokens that fill in a test, of which seven are kept."""
FORMS: dict[str, dict[str, Any]] = {
    "exact": {"max_distance": 0},
    "codes, bounded": {"key_bits": 4, "value_bits": 2, "max_distance": 48},
    "exact, bounded": {"max_distance": 48},
    "behind a tier": {"quantized": 5, "max_distance": 52},
    "passages": {"key_bits": 4, "value_bits": 2, "max_distance": 48, "slots": 34, "passage": 2},
    "one score": {"key_bits": 4, "value_bits": 2, "max_distance": 48, "slots": 34, "passage": 2, "score_layer": 0},
    "few heads": {"key_bits": 4, "value_bits": 2, "max_distance": 48, "slot_heads": ((1, 0),)},
    "behind a tier after RoPE": {"quantized": 5, "max_distance": 0, "keys_before_rope": False},
}


@cache
def shared(form: str, architecture: str = "qwen3") -> PreTrainedModel:
    sizes: dict[str, Any] = {"window": WINDOW, "sinks": SINKS, "prefill_chunk_size": 8}
    return adapted(architecture, memory="retained", **sizes, **FORMS[form]).double()


def compare(talk: Talk, other: Talk) -> None:
    for found, expected in zip(talk._logits, other._logits, strict=True):
        assert relative_error(torch.cat(found), torch.cat(expected)) < TOLERANCE
    assert_same_layers(talk.cache, other.cache)


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_ordinary_ones(form: str, architecture: str, graphs: Graphs) -> None:
    """In a padded batch, from before anything leaves until far tokens are seen elsewhere and most are forgotten."""
    model = shared(form, architecture)
    talk = Talk(model, 2)
    talk.read([5, 2])
    other = copy.deepcopy(talk)
    count = 3 * LOSSLESS + 2 * BLOCKS
    talk.steps(count)
    assert graphs == Graphs(captures=1, replays=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "on_gpu", lambda ids: False)
        other.steps(count)
    compare(talk, other)
    for one in (talk, other):
        one.read([3, 4])
        one.steps(3)
    compare(talk, other)
    # The kernels take these as they lie in memory.
    found = [x for seen in talk.cache.captured.retained.seen.values() for x in vars(seen).values()]
    assert all(x.is_contiguous() for x in found if isinstance(x, torch.Tensor))


def test_rows_are_decided_when_their_own_blocks_fill(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not all of a batch whenever one of them does, which in a large batch is nearly every step."""
    rows: list[int] = []
    decide = RetainedTokens.extra_keys
    talk = Talk(shared("codes, bounded"), 2)
    talk.read([LOSSLESS + 5, LOSSLESS + 4])

    def counted(memory: RetainedTokens, left: Evicted, *given: Any) -> Any:
        rows.append(len(left.key))
        return decide(memory, left, *given)

    monkeypatch.setattr(RetainedTokens, "extra_keys", counted)
    talk.steps(8)  # blocks are of two tokens: one of the rows fills one in each step
    assert graphs.replays == 8 and rows == [1] * 8 * len(talk.cache.memory_layers)


@pytest.mark.sample(3)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("form", ["exact", "behind a tier"])
def test_after_any_event_steps_go_on(event: str, form: str) -> None:
    lengths = (LOSSLESS + 7, LOSSLESS - 1, 5)
    converse(Talk(shared(form), len(lengths)), lengths, ["pause", event, event])


def test_most_steps_need_nothing_between_them(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fills a block, or moves the place of far tokens, does; others do not ask the device."""
    asked: list[int] = []
    show = RetainedSteps._show
    monkeypatch.setattr(RetainedSteps, "_show", lambda self, *of: (asked.append(of[1][0]), show(self, *of))[1])
    model = adapted(memory="retained", window=WINDOW, sinks=SINKS, slots=64, max_distance=80)
    assert model.model.layers[0].ahn.fn.block == 8
    talk = Talk(model, 1)
    talk.read([LOSSLESS])
    talk.steps(64)
    talk.check(TOLERANCE)
    # 64 tokens have left in eight blocks, and from position 20 on the place moves by four tokens.
    assert graphs.replays == 64 and len(asked) == 1 + 8 + 14

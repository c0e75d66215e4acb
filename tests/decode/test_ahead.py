"""`generate` launches a step before it knows whether the text is finished: everything is as if it had asked first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from captured import Graphs, shared
from models import tokens
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation import BaseStreamer

from ahn import AHNCache, private
from ahn.cli.writing import Interrupt
from ahn.decode import ahead
from ahn.evaluation.reader import FirstScores

PROMPT, NEW = 20, 14


class Kept(BaseStreamer):
    """What came, and when: by how many tokens the conversation had read."""

    def __init__(self, cache: AHNCache) -> None:
        self.cache, self.parts, self.seen, self.ended = cache, [], [], False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.tolist())
        self.seen.append(self.cache.seen)

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Inside its context `generate` asks first."""
    yield monkeypatch


def without(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ahead, "loop", lambda *of: None)
    patch.setattr("ahn.decode.loop", lambda *of: None)


def both(plain: pytest.MonkeyPatch, model: PreTrainedModel, rows: int = 1, **options: Any) -> list[tuple[Any, ...]]:
    """The text, the cache, the streamer and a random number, asked a step late and asked first."""
    ids, mask = tokens(rows, PROMPT), torch.ones(rows, PROMPT, dtype=torch.long)
    if rows > 1:
        mask[0, :3] = 0
    found = []
    for first in (False, True):
        with plain.context() as patch:
            if first:
                without(patch)
            torch.manual_seed(3)
            cache = AHNCache.for_model(model)
            streamer = Kept(cache) if rows == 1 else None
            text = model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, streamer=streamer,
                pad_token_id=0, **options,
            )  # fmt: skip
            found.append((text, cache, streamer, torch.rand(())))
    return found


def assert_same(model: PreTrainedModel, found: list[tuple[Any, ...]]) -> None:
    (text, cache, streamer, random), (expected, asked_first, other, wanted) = found
    assert torch.equal(text, expected)
    assert torch.equal(random, wanted)
    assert cache.seen == asked_first.seen and cache.ahead is None and cache.captured.going is None
    if streamer is not None:
        assert streamer.parts == other.parts and streamer.ended
    logits = []
    for each in (cache, asked_first):  # and the conversation goes on alike
        with torch.no_grad():
            for step in range(3):
                logits.append(model(text[:, step : step + 1], past_key_values=each).logits)
    for a, b in zip(logits[:3], logits[3:], strict=True):
        assert torch.equal(a, b)


def an_end(model: PreTrainedModel, rows: int = 1) -> list[int]:
    """Tokens that end a text after some steps, of each row another."""
    mask = torch.ones(rows, PROMPT, dtype=torch.long)
    if rows > 1:
        mask[0, :3] = 0
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    text = model.generate(tokens(rows, PROMPT), attention_mask=mask, **options)
    return [int(row[PROMPT + 5 + n]) for n, row in enumerate(text)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("memory", ["gated_deltanet", "window_only"])
def test_texts_streams_and_caches_are_the_same(
    memory: str, rows: int, ends: bool, plain: pytest.MonkeyPatch, graphs: Graphs
) -> None:
    model = shared(memory=memory)
    eos = an_end(model, rows) if ends else None
    replays = graphs.replays
    found = both(plain, model, rows, do_sample=False, eos_token_id=eos)
    assert graphs.replays > replays
    if ends:
        assert found[0][0].shape[1] < PROMPT + NEW
    assert_same(model, found)


def test_samples_and_random_numbers_are_the_same(plain: pytest.MonkeyPatch) -> None:
    model = shared()
    for seed_token in an_end(model), None:
        found = both(plain, model, do_sample=True, temperature=0.8, top_k=20, eos_token_id=seed_token)
        assert_same(model, found)


def test_tokens_come_while_the_next_step_is_under_way(plain: pytest.MonkeyPatch) -> None:
    late, first = both(plain, shared(), do_sample=False)
    # The first two come as they always did: nothing was captured before the second step.
    assert [a - b for a, b in zip(late[2].seen, first[2].seen, strict=True)][3:-1] == [1] * (NEW - 3)


def test_scores_are_of_the_text_alone(plain: pytest.MonkeyPatch) -> None:
    model = shared()
    found = both(
        plain, model, do_sample=False, eos_token_id=an_end(model), return_dict_in_generate=True, output_scores=True
    )
    (out, *_), (expected, *_) = found
    assert len(out.scores) == len(expected.scores)
    assert all(torch.equal(a, b) for a, b in zip(out.scores, expected.scores, strict=True))


def test_an_interrupt_leaves_a_conversation_that_goes_on(plain: pytest.MonkeyPatch) -> None:
    class Stops(Kept):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.parts) == 7:
                raise KeyboardInterrupt

    model, cache = shared(), AHNCache.for_model(shared())
    ids = tokens(1, PROMPT)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False, streamer=Stops(cache))
    assert cache.ahead is None and cache.captured.going is None
    assert int(cache.captured.positions[0]) == cache.seen
    with torch.no_grad():
        model(ids[:, :1], past_key_values=copy.deepcopy(cache))


class Own(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def test_what_others_wrote_is_asked_in_time() -> None:
    model, ids = shared(), tokens(1, PROMPT)
    assert ahead.loop(model, {}, ids) is not None
    assert ahead.loop(model, {"logits_processor": [FirstScores(model)]}, ids) is not None
    assert ahead.loop(model, {"logits_processor": [Own()]}, ids) is None
    assert ahead.loop(model, {"stopping_criteria": [Interrupt()]}, ids) is None
    assert ahead.loop(model, {"num_beams": 2}, ids) is None
    assert ahead.loop(model, {"prompt_lookup_num_tokens": 3}, ids) is None
    assert ahead.loop(model, {"custom_generate": print}, ids) is None


def test_transformers_still_looks_for_the_class_by_name() -> None:
    """Else ours would never be asked, without a word."""
    assert "DeferredStopCheck" in private.sampling_loop(ahead.StepsAhead).__code__.co_names

"""The next token of each row: as transformers' own processors have it, and no business of the neighbours."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from ahn.errors import AHNError
from ahn.serve.api.building import sampling_defaults
from ahn.serve.engine.sampling import Chooser, choose, cut
from ahn.serve.request import SamplingOptions

VOCABULARY = 50
CPU = torch.device("cpu")


def logits(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def chooser(ids: list[int] | None = None, prompt: int = 3, **options: Any) -> Chooser:
    ids = ids or [1, 2, 3]
    return Chooser(SamplingOptions(**options), np.array(ids[:prompt]), ids[prompt:], CPU)


def reference(options: SamplingOptions, ids: list[int], scores: Tensor) -> Tensor:
    own: list[Any] = []
    if options.logit_bias:
        own.append(theirs.SequenceBiasLogitsProcessor([[[token], bias] for token, bias in options.logit_bias.items()]))
    if options.repetition_penalty != 1:
        own.append(theirs.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    own.append(theirs.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        own.append(theirs.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        own.append(theirs.TopPLogitsWarper(options.top_p))
    if options.min_p:
        own.append(theirs.MinPLogitsWarper(options.min_p))
    return LogitsProcessorList(own)(torch.tensor([ids]), scores[None].clone())[0]


MIXED = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 1},
    {"top_k": 7, "top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.2, "temperature": 2.0},
    {"repetition_penalty": 1.4, "top_p": 0.9, "min_p": 0.01, "top_k": 20},
    {"logit_bias": {3: 4.0, 7: -100.0}, "repetition_penalty": 0.8},
    {"top_k": 10 * VOCABULARY},
]


def test_each_row_is_cut_as_by_transformers() -> None:
    rows = [chooser([1, 2, 3, 3, 40], **options) for options in MIXED]
    scores = logits(len(MIXED))
    changed = torch.stack([row.changed(own) for row, own in zip(rows, scores, strict=True)])
    kept = cut(changed, [row.options for row in rows])
    for row, own, before in zip(rows, kept, scores, strict=True):
        wanted = reference(row.options, [*row.prompt.tolist(), *row.reply], before)
        torch.testing.assert_close(own, wanted - wanted.max())


def test_presence_and_frequency_are_of_the_reply_alone() -> None:
    row, scores = chooser([5, 5, 5, 8, 9, 8], prompt=3, presence_penalty=0.5, frequency_penalty=0.25), logits(1)[0]
    wanted = scores.clone()
    wanted[8] -= 0.5 + 2 * 0.25
    wanted[9] -= 0.5 + 0.25
    torch.testing.assert_close(row.changed(scores), wanted)
    row.reply.append(9)
    wanted[9] -= 0.25
    torch.testing.assert_close(row.changed(scores), wanted)


def test_temperature_zero_takes_the_best() -> None:
    scores = logits(3)
    rows = [chooser(temperature=0), chooser(seed=1), chooser(temperature=0, logit_bias={11: 1000})]
    chosen = choose(scores, rows)
    assert chosen[0].token == int(scores[0].argmax()) and chosen[2].token == 11


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])
def test_a_temperature_near_zero_takes_the_best(temperature: float) -> None:
    """1e-320 is no number of float32; scores divided by 1e-40 are none."""
    scores = logits(4)
    rows = [chooser(seed=row, temperature=temperature, top_p=(1, 0.5)[row % 2]) for row in range(4)]
    assert [one.token for one in choose(scores, rows)] == scores.argmax(-1).tolist()


def test_a_score_that_a_penalty_makes_infinite_stays_the_best() -> None:
    scores = logits(1).abs()
    assert choose(scores, [chooser([1], seed=0, temperature=0.5, repetition_penalty=1e-300)])[0].token == 1


def test_draws_follow_the_probabilities() -> None:
    scores, row = logits(1), chooser(temperature=1.0, top_k=5, seed=0)
    share = cut(scores, [row.options])[0].softmax(-1)
    draws = 1500
    found = Counter(choose(scores, [row])[0].token for _ in range(draws))
    assert set(found) <= set(share.nonzero()[:, 0].tolist())
    for token, p in enumerate(share.tolist()):
        # Five deviations of a binomial share.
        assert abs(found[token] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-9


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    def texts(neighbours: int) -> list[int]:
        own, others = chooser(seed=7, top_p=0.9), [chooser(seed=i, **MIXED[i]) for i in range(neighbours)]
        return [choose(logits(1 + neighbours, seed)[: 1 + neighbours], [own, *others])[0].token for seed in range(20)]

    def alone() -> list[int]:
        own = chooser(seed=7, top_p=0.9)
        return [choose(logits(5, seed)[:1], [own])[0].token for seed in range(20)]

    def beside() -> list[int]:
        own, others = chooser(seed=7, top_p=0.9), [chooser(seed=i, **MIXED[i]) for i in range(4)]
        return [choose(logits(5, seed), [own, *others])[0].token for seed in range(20)]

    assert alone() == beside() and len(set(alone())) > 3
    assert texts(0) == texts(0)


def test_seeds() -> None:
    def text(seed: int | None) -> list[int]:
        row = chooser(seed=seed, temperature=2.0)
        return [choose(logits(1, step), [row])[0].token for step in range(30)]

    assert text(3) == text(3) != text(4)
    assert text(None) != text(None)


def test_log_probabilities_are_of_the_model_alone() -> None:
    scores, row = logits(1), chooser(temperature=0.1, top_k=2, logit_bias={4: 1000}, logprobs=3)
    chosen = choose(scores, [row])[0]
    wanted = scores[0].log_softmax(-1)
    assert chosen.token == 4 and chosen.logprobs is not None
    assert chosen.logprobs.logprob == pytest.approx(float(wanted[4]))
    assert [token for token, _ in chosen.logprobs.top] == wanted.topk(3).indices.tolist()
    assert choose(scores, [chooser()])[0].logprobs is None
    none = choose(scores, [chooser(logprobs=0)])[0].logprobs
    assert none is not None and none.top == ()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_no_numbers_fail_their_row_alone(broken: float) -> None:
    scores = logits(3)
    scores[1, 5] = broken
    chosen = choose(scores, [chooser(seed=0), chooser(seed=0), chooser(temperature=0)])
    assert chosen[1].error is not None and "not numbers" in chosen[1].error
    assert chosen[0].error is None and chosen[2].token == int(scores[2].argmax())


def test_a_processor_sees_its_row_and_fails_alone() -> None:
    seen: list[Any] = []

    def only_nine(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((ids.tolist(), scores.shape))
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([9]), 0.0)

    def fails(ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("no such rule")

    rows = [chooser(processors=(fails,)), chooser([4, 5], 1, processors=(only_nine,)), chooser(temperature=0)]
    chosen = choose(logits(3), rows)
    assert seen == [([[4, 5]], (1, VOCABULARY))]
    assert chosen[1].token == 9 and chosen[2].error is None
    assert chosen[0].error is not None and "no such rule" in chosen[0].error


def test_where_nothing_is_allowed_is_an_error() -> None:
    none = (lambda ids, scores: torch.full_like(scores, float("-inf")),)
    chosen = choose(logits(3), [chooser(processors=none), chooser(processors=none, temperature=0), chooser()])
    assert all("No token" in (chosen[i].error or "") for i in (0, 1)) and chosen[2].error is None


def test_seeds_below_zero_are_their_own() -> None:
    assert len({chooser(temperature=1.0, seed=seed).draw() for seed in (-2, -1, 0, 1, 2)}) == 5


def test_options_are_not_changed() -> None:
    options = SamplingOptions(logit_bias={1: 2.0})
    before = dataclasses.replace(options)
    choose(logits(1), [Chooser(options, np.array([1]), [], CPU)])
    assert options == before


def test_a_penalty_of_the_models_settings_holds_without_sampling() -> None:
    """As in `generate`; the others are about draws."""
    settings = transformers.GenerationConfig(repetition_penalty=1.3, top_k=7)
    model = SimpleNamespace(generation_config=settings)
    assert sampling_defaults(model) == SamplingOptions(repetition_penalty=1.3)
    settings.do_sample = True
    assert sampling_defaults(model) == SamplingOptions(repetition_penalty=1.3, top_k=7)
    settings.stop_strings = "###"
    assert sampling_defaults(model) == SamplingOptions(repetition_penalty=1.3, top_k=7, stop=("###",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "hot"},
        {"temperature": -1.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"top_p": math.nan},
        {"stop_strings": 5},
        {"stop_strings": ["", "x"]},
    ],
    ids=str,
)
def test_settings_of_the_model_by_which_no_token_can_be_chosen_are_refused(wrong: dict[str, Any]) -> None:
    settings = transformers.GenerationConfig(do_sample=True)
    vars(settings).update(wrong)
    with pytest.raises(AHNError, match=f"do not work here: {next(iter(wrong))} is"):
        sampling_defaults(SimpleNamespace(generation_config=settings))

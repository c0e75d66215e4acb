"""Parts of benchmarks/quality, in small: data and optimiser are what the model card says."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ahn import tiny
from ahn.tiny.corpus import held_out_text
from ahn.tiny.facts import FactWriter

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

from stages.base import learning_rate
from stages.batches import KEPT, Answers, Batches, Renamer, Texts, stored_batches
from stages.model import build, hidden_states, save
from stages.optimizer import Muon, orthogonalise
from stages.pace import RESERVE, SETTLED, Pace
from stages.recipes import TINY, smoke

SMOKE = smoke(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """What `prepare` writes, of two modules."""
    out = tmp_path_factory.mktemp("run")
    texts = dict(held_out_text())
    np.save(out / "train.npy", np.array(tokenizer.encode(texts["argparse"]), dtype=np.uint16))
    np.savez(out / "held_out.npz", difflib=np.array(tokenizer.encode(texts["difflib"]), dtype=np.uint16))
    return out


def test_batches_are_a_function_of_the_step(folder: Path, tokenizer) -> None:
    texts = Texts(SMOKE, folder, tokenizer)
    batches = Batches(SMOKE, texts, 0)
    ids, weights = batches[0]
    phase = SMOKE.phases[0]
    assert ids.shape == (phase.batch, phase.length + 1)
    assert weights.shape == (phase.batch, phase.length)
    assert torch.equal(batches[0][0], ids)
    assert not torch.equal(batches[1][0], ids)
    assert len(list(batches)) == phase.steps
    later = Batches(SMOKE, texts, 1)
    assert later[0][0].shape[1] == SMOKE.phases[1].length + 1
    # Weighted positions are answers: all of them values of facts, the token before a key.
    answers = ids[:, 1:][weights == SMOKE.answer_weight]
    assert set(answers.tolist()) <= set(texts.facts.values.values())
    assert phase.batch * phase.facts[0] <= len(answers) <= phase.batch * phase.facts[1]


def test_distillation_learns_answers_and_text_only(folder: Path, tokenizer) -> None:
    writer = FactWriter(tokenizer)
    batches = stored_batches(SMOKE, SMOKE.distillation, folder, tokenizer, seed=3)
    assert len(batches) == SMOKE.distillation.steps
    batch = batches[1]
    ids, learned = Answers(SMOKE.distillation, Texts(SMOKE, folder, tokenizer), seed=3)[1]
    assert np.array_equal(batch["input_ids"], ids) and np.array_equal(batch["labels"] != -100, learned)
    masked = batch["labels"] == -100
    assert torch.equal(batch["labels"][~masked], batch["input_ids"][~masked])
    facts = torch.isin(batch["input_ids"], torch.tensor(list(writer.values.values())))
    assert (facts & ~masked).any() and (facts & masked).any()
    other = stored_batches(SMOKE, SMOKE.distillation, folder, tokenizer, seed=4)
    assert not torch.equal(other[1]["input_ids"], batch["input_ids"])


def test_renaming_is_one_to_one_and_spares_frequent_and_fixed_tokens(folder: Path, tokenizer) -> None:
    train = np.load(folder / "train.npy")
    fixed = {tokenizer.encode(" tiger")[0]}
    rename = Renamer(tokenizer, train, fixed)
    table = rename(np.arange(len(tokenizer)), np.random.default_rng(0))
    assert sorted(table) == list(range(len(tokenizer)))
    changed = set(np.flatnonzero(table != np.arange(len(tokenizer))).tolist())
    frequent = set(np.argsort(-np.bincount(train, minlength=len(tokenizer)))[:KEPT].tolist())
    assert len(changed) > 300
    assert not changed & (fixed | frequent)


def test_muon_steps_are_orthogonal_and_of_adams_size() -> None:
    torch.manual_seed(0)
    update = orthogonalise(torch.randn(3, 16, 48)).float()
    singular = torch.linalg.svdvals(update)
    # The quintic's five rounds leave singular values within about [0.7, 1.2] (bfloat16 adds a little).
    assert singular.min() > 0.6 and singular.max() < 1.3
    tall = torch.nn.Parameter(torch.zeros(48, 16))
    tall.grad = torch.randn(48, 16)
    Muon([tall], lr=1.0, weight_decay=0.0).step()
    # Root mean square 0.2 for singular values of 1.
    assert 0.6 * 0.2 < tall.square().mean().sqrt() < 1.3 * 0.2
    assert (tall * tall.grad).sum() < 0


def test_learning_rate_rises_stays_and_falls() -> None:
    recipe = dataclasses.replace(SMOKE, warmup=4, cooldown=0.5)
    pace = Pace(recipe, None)
    steps = [(number, step) for number, phase in enumerate(recipe.phases) for step in range(phase.steps)]
    rates = [learning_rate(recipe, done, pace.progress(*step)) for done, step in enumerate(steps)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[recipe.steps // 2] == 1.0
    assert 0 < rates[-1] < 0.1
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)


@pytest.mark.parametrize(("seconds", "compiling", "step_time"), [(300, 60, 0.1), (200, 20, 0.4), (3000, 60, 0.05)])
def test_a_limited_pace_ends_in_time_and_reaches_the_end(seconds: float, compiling: float, step_time: float) -> None:
    now = 0.0
    pace = Pace(TINY, seconds, clock=lambda: now)
    last = 0.0
    for number, phase in enumerate(TINY.phases):
        pace.begin()
        step = 0
        while step < pace.steps[number]:
            assert last <= pace.progress(number, step) < 1
            last = pace.progress(number, step)
            # Every step of one phase takes as long; phases differ by the tokens of a step.
            now += compiling if step == 0 else step_time * phase.batch * phase.length / 65536
            pace.done(number, step)
            step += 1
        assert SETTLED < step <= phase.steps
    assert pace.progress(len(TINY.phases) - 1, pace.steps[-1]) == 1.0
    unlimited = len(TINY.phases) * compiling + TINY.steps * step_time
    if unlimited < seconds - RESERVE:
        assert pace.steps == [phase.steps for phase in TINY.phases]
    # Within a step of each phase and what measuring needs.
    assert now <= seconds - RESERVE + 2 * len(TINY.phases) * step_time
    assert now >= min(unlimited, seconds - RESERVE) - compiling - 2 * len(TINY.phases) * step_time


def test_hidden_states_are_the_models_own(tmp_path: Path, tokenizer) -> None:
    model = build(SMOKE, tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, len(tokenizer), (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model.lm_head(hidden_states(model, ids)), expected)
    save(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name

"""The stages of scripts/train_tiny.py, in small: data and optimiser are what the model card says."""

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

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from tiny_stages.base import learning_rate  # noqa: E402
from tiny_stages.batches import KEPT, Answers, Batches, Renamer  # noqa: E402
from tiny_stages.evaluate import Evaluation, banded  # noqa: E402
from tiny_stages.model import build, hidden_states, save  # noqa: E402
from tiny_stages.optimizer import Muon, orthogonalise  # noqa: E402
from tiny_stages.recipe import SMOKE  # noqa: E402


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
    batches = Batches(SMOKE, folder, tokenizer)
    ids, weights = batches[0]
    phase = SMOKE.phases[0]
    assert ids.shape == (phase.batch, phase.length + 1)
    assert weights.shape == (phase.batch, phase.length)
    assert torch.equal(batches[0][0], ids)
    assert not torch.equal(batches[1][0], ids)
    assert batches[phase.steps][0].shape[1] == SMOKE.phases[1].length + 1
    # Weighted positions are answers: all of them values of facts, the token before a key.
    answers = ids[:, 1:][weights == SMOKE.answer_weight]
    assert set(answers.tolist()) <= set(batches.facts.values.values())
    assert phase.batch * phase.facts[0] <= len(answers) <= phase.batch * phase.facts[1]


def test_distillation_learns_answers_and_text_only(folder: Path, tokenizer) -> None:
    writer = FactWriter(tokenizer)
    batch = Answers(SMOKE, folder, tokenizer)[0]
    masked = batch["labels"] == -100
    assert torch.equal(batch["labels"][~masked], batch["input_ids"][~masked])
    facts = torch.isin(batch["input_ids"], torch.tensor(list(writer.values.values())))
    assert (facts & ~masked).any() and (facts & masked).any()


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
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[recipe.steps // 2] == 1.0
    assert 0 < rates[-1] < 0.1
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)


def test_hidden_states_are_the_models_own(tmp_path: Path, tokenizer) -> None:
    model = build(SMOKE, tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, len(tokenizer), (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model.lm_head(hidden_states(model, ids)), expected)
        # A band as long as the sequence hides nothing; the mask takes another kernel, so equal to float32 rounding.
        banded_logits = model.lm_head(hidden_states(model, ids, banded(ids, 40, 0)))
        torch.testing.assert_close(banded_logits, expected, rtol=1e-4, atol=1e-4)
    save(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name


def test_band() -> None:
    visible = banded(torch.zeros(1, 6), window=2, sinks=1)[0, 0]
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


def test_evaluation_finds_what_a_perfect_model_would_recall(folder: Path, tokenizer) -> None:
    """A head that reads the next token off the "hidden state" recalls every fact and loses nothing."""
    writer = FactWriter(tokenizer)
    evaluation = Evaluation(SMOKE, folder, writer, SMOKE.evaluation_length, 2)
    size = len(tokenizer)
    head = torch.nn.Linear(size, size, bias=False)
    torch.nn.init.eye_(head.weight)

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        return 100.0 * torch.nn.functional.one_hot(ids.roll(-1, dims=1), size).float()

    found = evaluation("perfect", hidden, head)
    assert found["loss_perfect"] < 1e-3
    recalls = [value for key, value in found.items() if key.startswith("recall")]
    assert recalls and all(value == 1.0 for value in recalls)

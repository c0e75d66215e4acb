"""What benchmarks/quality measures on, and how sure its numbers are."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ahn
from ahn import tiny
from ahn.measure.method import Method
from ahn.tiny.corpus import held_out_text
from ahn.tiny.facts import FactWriter
from ahn.training.losses import Head

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

from stages.evaluate import Bench, summarise
from stages.intervals import bootstrap
from stages.probes import DEPTHS, Probes, by_distance, read, recalled, repeat_distances
from stages.reading import fit_window, method, reader
from stages.recipe import Context, Run, Task

CONTEXT = Context(512, (128,), chunks=3, texts=2, needle_lengths=(300,), trials=2)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Probes:
    folder = tmp_path_factory.mktemp("probes")
    texts = dict(held_out_text())
    names = ("difflib", "argparse")
    np.savez(folder / "held_out.npz", **{n: np.array(tokenizer.encode(texts[n]), dtype=np.uint16) for n in names})
    return Probes(folder, FactWriter(tokenizer), CONTEXT)


def test_repeat_distances_are_those_of_a_plain_search() -> None:
    ids = np.random.default_rng(0).integers(0, 5, size=80)
    for t in range(1, len(ids)):
        earlier = [s for s in range(1, t) if (ids[s - 1], ids[s]) == (ids[t - 1], ids[t])]
        assert repeat_distances(ids)[t - 1] == (t - earlier[-1] if earlier else 0)


def test_texts_are_whole_and_needles_lie_where_they_should(probes: Probes) -> None:
    assert probes.chunks.shape == (3, 512)
    assert probes.sources == ["difflib", "argparse", "difflib"]
    assert {len(text.ids) for text in probes.texts} == {512}
    needles = probes.needles[300]
    assert [needle.depth for needle in needles] == [depth for depth in DEPTHS for _ in range(2)]
    for needle in needles:
        (fact,) = needle.text.facts
        assert len(needle.text.ids) == 300 + probes.facts.cost
        assert needle.text.ids[fact.answer] == probes.facts.values[fact.value]
        assert needle.text.ids[fact.answer - fact.distance] == probes.facts.values[fact.value]
        # Lines are up to a few dozen tokens long; the question is in the last of them.
        assert abs(fact.answer - fact.distance - needle.depth * 300) < 80
        assert fact.answer > 300 - 80


def test_a_perfect_model_recalls_everything(probes: Probes, tokenizer) -> None:
    """One that reads the next token off the "hidden state"."""
    size = len(tokenizer)

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids.roll(-1, dims=1), size).float()

    for texts in (probes.texts, [needle.text for needle in probes.needles[300]]):
        for number, states in read(hidden, [text.ids for text in texts], rows=3):
            assert all(recalled(states, lambda x: x, texts[number], probes.facts.values))
            assert not any(recalled(states, lambda x: x.roll(1, -1), texts[number], probes.facts.values))
    counts = by_distance(probes.texts, [True] * sum(len(text.facts) for text in probes.texts))
    assert all(hits == asked > 0 for hits, asked in counts.values())


@pytest.mark.slow
def test_losses_of_a_reading_are_the_models_own(probes: Probes, model) -> None:
    bench = Bench(model, probes)
    task = Task(Run("full"), None)
    with method(model, Path(), task, 128, 16, 512) as reading, torch.no_grad():
        found = bench.measure(reading)
        logits = model(probes.chunks).logits[:, :-1]
    ce, kl = found.ce, found.kl
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), probes.chunks[:, 1:], reduction="none")
    np.testing.assert_allclose(ce, expected, atol=1e-4)
    assert np.abs(kl).max() < 1e-5
    row = summarise(probes, ce, kl, [True] * sum(len(text.facts) for text in probes.texts), 128, 16)
    assert row["loss"] == pytest.approx(expected[:, 128:].mean().item(), abs=1e-4)
    assert row["loss"] == pytest.approx(np.mean(row["chunk_losses"]), abs=1e-4)
    assert sum(count for _, count in row["loss_by_repeat"].values()) == 3 * (511 - 128)
    assert row["recall_beyond"][0] == row["recall_beyond"][1] > 0


@pytest.mark.slow
def test_a_window_loses_what_only_full_attention_sees(probes: Probes, model) -> None:
    bench = Bench(model, probes)
    with method(model, Path(), Task(Run("window_only"), None), 128, 16, 512) as reading, torch.no_grad():
        assert reading.about["window"] == 112
        found = bench.measure(reading)
        logits = Head.of(model).logits(torch.stack(bench.teacher)[:, :-1].flatten(0, 1))
    ce, kl = found.ce, found.kl
    full = torch.nn.functional.cross_entropy(logits, probes.chunks[:, 1:].flatten(), reduction="none").view(3, -1)
    np.testing.assert_allclose(ce[:, :128], full[:, :128], atol=1e-4)  # nothing has left yet
    assert kl[:, 128:].mean() > 0.01 and (ce - full.numpy())[:, 128:].mean() > 0.01
    assert not hasattr(model, "ahn_config")


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [0, 150])
def test_sequences_read_together_are_those_read_alone(model, quantized: int) -> None:
    """Of different lengths, in any order, more than fit into one batch and not a multiple of it.

    In float64: in float32 one rounding may turn a code, which changes all that follows.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 4000, (length,), generator=generator) for length in (300, 90, 500, 310, 40)]
    exact = copy.deepcopy(model).double()
    ahn.attach(exact, ahn.AHNConfig(memory="window_only", window=112, sinks=16, quantized=quantized))
    hidden = reader(exact)
    shapes: list[torch.Size] = []

    def counted(ids: torch.Tensor) -> torch.Tensor:
        shapes.append(ids.shape)
        return hidden(ids)

    with torch.no_grad():
        found = dict(read(counted, sequences, rows=2))
        assert shapes == [(2, 90), (2, 310), (2, 500)] and set(found) == set(range(5))
        for number, ids in enumerate(sequences):
            torch.testing.assert_close(found[number], hidden(ids[None])[0], rtol=0, atol=1e-10)


@pytest.mark.sample(1)
@pytest.mark.parametrize("memory", ["window_only", "ct_max", "gated_deltanet"])
def test_budgets_are_equal(model, memory: str) -> None:
    config = fit_window(ahn.AHNConfig(memory=memory, window=112, sinks=16), 128)
    with Method(memory, config).on(model):
        fn = next(iter(model.model.layers)).ahn.fn
        slots = [fn.slot_count(config.window + more) for more in (0, 1)]
        assert config.lossless + slots[0] <= 128 < config.lossless + 1 + slots[1]
        ids = torch.randint(0, 100, (1, 300))
        with torch.no_grad():
            assert reader(model)(ids).shape == (1, 300, 256)


def test_bootstrap_draws_documents() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    value, low, high = bootstrap(lambda x: x, [values], [str(n) for n in range(400)])
    assert value == pytest.approx(values.mean())
    # A normal mean's interval is ± 1.96 standard errors; 2000 draws know its ends to some 5 % of its width.
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((value - error, value + error), abs=0.2 * error)
    # Ten copies of each number in one document say no more than one.
    copied = bootstrap(lambda x: x, [np.repeat(values[:40], 10)], [str(n // 10) for n in range(400)])
    alone = bootstrap(lambda x: x, [values[:40]], [str(n) for n in range(40)])
    assert copied == pytest.approx(alone)

"""What benchmarks/inspect_routes.py says: of whom it compares what, and of a memory that has just begun."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import ahn
from ahn import AHNError, tiny
from ahn.demo.documents import make_documents
from ahn.tiny.corpus import held_out_text

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import inspect_routes

WINDOW, SINKS, LENGTH = 96, 8, 1024
OPTIONS = ("--window", str(WINDOW), "--sinks", str(SINKS), "--length", str(LENGTH), "--documents", "2")


def attached(memory: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny.path())
    return ahn.attach(model, ahn.AHNConfig(memory=memory, window=WINDOW, sinks=SINKS))


def run(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    ahn.save_adapter(attached(memory), tmp_path / "adapter")
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["inspect_routes", str(tmp_path / "adapter"), str(out), *OPTIONS])
    inspect_routes.main()
    return json.loads(out.read_text())


def test_a_query_is_compared_with_the_key_of_its_own_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each position writes into a state of its own; only a fact's query reads, and where its value was written."""
    model, tokenizer = attached("routed_deltanet"), AutoTokenizer.from_pretrained(tiny.path())
    (document, *_), _ = make_documents(tokenizer, held_out_text(), 1, LENGTH, WINDOW + SINKS)
    count = LENGTH - WINDOW - SINKS
    written = one_hot(torch.arange(count), count).float()  # row i is position SINKS + i
    read = torch.zeros(count, count)  # row i is position WINDOW + SINKS + i
    for fact in document.facts_beyond(WINDOW, SINKS):
        read[fact.answer - 1 - WINDOW - SINKS, fact.answer - fact.distance - SINKS] = 1

    @contextlib.contextmanager
    def known(model: PreTrainedModel) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        yield {0: (written[None], read[None])}

    monkeypatch.setattr(inspect_routes, "shares_of", known)
    row = inspect_routes.one(model, document)[0]
    assert row["in common with the fact"].tolist() == [1.0]
    torch.testing.assert_close(row["in common with any key"], torch.tensor([1 / count]))
    torch.testing.assert_close(row["states used"], torch.tensor([float(count)]), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_shares_are_those_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = run("routed_deltanet", tmp_path, monkeypatch)["layers"]
    assert list(layers) == [str(layer) for layer in range(8)]
    for row in layers.values():
        assert all(len(values) == 4 for values in row.values())
        assert all(1 <= used <= 8 + 1e-4 for used in row["states used"])
        first, second, third, fourth = row["largest share, keys"]  # query heads of two key heads
        assert first == second != third == fourth
        for name in ("keys", "queries"):
            assert all(1 / 8 <= share <= 1 for share in row[f"largest share, {name}"])


@pytest.mark.slow
def test_one_state_leaves_nothing_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AHNError, match="deltanet has one state a head"):
        run("deltanet", tmp_path, monkeypatch)


def test_a_folder_that_is_not_there_is_named_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect_routes", "deltanet", "nowhere/out.json"])
    with pytest.raises(SystemExit):
        inspect_routes.main()
    assert "no folder nowhere" in capsys.readouterr().err

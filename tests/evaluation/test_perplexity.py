"""Perplexity by position: the losses of one plain forward, in constant memory, and what the folder says of them."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from word_tokenizer import WordTokenizer

import ahn
from ahn.errors import AHNError
from ahn.evaluation import documents, methods, perplexity
from ahn.evaluation.methods import Evaluated

LENGTH = 150
IDS = models.tokens(1, LENGTH)[0].tolist()


def forward_losses(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(IDS[1:]), reduction="none")


@pytest.mark.sample(1)
@pytest.mark.parametrize(("bucket", "chunk"), [(64, 64), (75, 7), (1000, 33)])
@pytest.mark.parametrize("memory", [None, "gated_deltanet", "window_only", "ct_max"])
def test_losses_are_those_of_one_forward(memory: str | None, bucket: int, chunk: int) -> None:
    model = models.base() if memory is None else models.adapted(memory=memory, window=24, sinks=4)
    losses, buckets = perplexity.measure(model, IDS, bucket, chunk)
    # Float32: chunks sum attention and state in another order.
    torch.testing.assert_close(losses, forward_losses(model), rtol=1e-4, atol=1e-4)
    assert [one.start for one in buckets] == list(range(0, LENGTH, bucket))
    assert [one.stop for one in buckets] == [*range(bucket, LENGTH, bucket), LENGTH]
    for one in buckets:  # a loss belongs to the position of the token that is predicted; the first has none
        assert one.loss == pytest.approx(float(losses[max(0, one.start - 1) : one.stop - 1].mean()))


def test_losses_that_are_no_numbers_are_no_result() -> None:
    model = models.base()
    model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(AHNError, match=r"not numbers \(NaN\)"):
        perplexity.measure(model, IDS)


@pytest.mark.slow
def test_the_cache_stops_growing_with_the_window() -> None:
    full = [one.cache_bytes for one in perplexity.measure(models.base(), IDS, 50)[1]]
    assert full == [full[0], 2 * full[0], 3 * full[0]]
    adapted = models.adapted(memory="gated_deltanet", window=24, sinks=4)
    assert len({one.cache_bytes for one in perplexity.measure(adapted, IDS, 50)[1]}) == 1


def test_progress_counts_every_token() -> None:
    told: list[int] = []
    perplexity.measure(models.base(), IDS, 75, 16, told.append)
    assert sum(told) == LENGTH and max(told) == 16


def evaluated(method: str) -> Evaluated:
    model = models.adapted(memory="gated_deltanet", window=24, sinks=4)
    if method != "ahn":
        other = methods.make(method, model.ahn_config)
        ahn.detach(model)
        other.attach(model)
    return Evaluated(model, None, method, methods.describe(model, method) | {"model": "random"}, {"model": "here"})


@pytest.mark.slow
def test_a_result_folder(tmp_path: Path) -> None:
    document = documents.LongDocument("book", "abc", IDS)
    used = {method: evaluated(method) for method in ("ahn", "window", "full")}
    results = {method: perplexity.run(one, document, tmp_path, 50) for method, one in used.items()}
    folders = {json.loads((path / "result.json").read_text())["method"]: path for path in tmp_path.iterdir()}
    assert folders.keys() == results.keys()
    for method, result in results.items():
        losses = forward_losses(used[method].model)
        rows = [json.loads(line) for line in (folders[method] / "positions.jsonl").read_text().splitlines()]
        assert [row["start"] for row in rows] == [0, 50, 100]
        assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
        assert result["cache_bytes"] == rows[-1]["cache_bytes"] and result["tokens"] == LENGTH
        assert result["document"] == "book" and result["task"] == "perplexity"
        # Beyond sinks + window = 28: the first token that is predicted with something forgotten is the 29th.
        beyond = None if method == "full" else pytest.approx(float(losses[27:].mean()), rel=1e-4)
        assert result["loss_beyond"] == beyond
    assert results["ahn"]["loss"] != results["window"]["loss"] != results["full"]["loss"]
    config = json.loads((folders["ahn"] / "config.json").read_text())
    assert config["settings"]["task_settings"]["sha256"] == "abc" and config["about"] == {"model": "here"}
    again = perplexity.run(evaluated("ahn"), document, tmp_path, 50)
    assert again == results["ahn"] and len(list(tmp_path.iterdir())) == 3


def test_cost_by_length_is_that_of_the_method() -> None:
    for method in ("ahn", "full"):
        model = evaluated(method).model
        config = getattr(model, "ahn_config", None) or ahn.AHNConfig()
        for row in perplexity.costs(model):
            both = ahn.cost(model.config, config, row["length"], torch.float32)
            usage = both.ahn if method == "ahn" else both.full
            assert (row["flops"], row["cache_bytes"]) == (usage.model_flops, usage.cache_bytes)


def test_documents(tmp_path: Path) -> None:
    tokenizer = WordTokenizer()
    (tmp_path / "a.txt").write_text("one two three four")
    found = documents.tokenised(tokenizer, documents.read(tmp_path / "a.txt"))
    assert found.name == "a.txt" and len(found.ids) == 4
    assert len(documents.tokenised(tokenizer, documents.read(tmp_path / "a.txt"), 3).ids) == 3
    books = [{"text": "a b c", "short_book_title": "First"}, {"text": "d e f g", "url": "x"}]
    (tmp_path / "pg.jsonl").write_text("\n".join(map(json.dumps, books)))
    assert [documents.read(tmp_path / "pg.jsonl", n)[0] for n in (0, 1)] == [
        "pg.jsonl: First",
        "pg.jsonl: book 1",
    ]
    held_out = documents.tokenised(tokenizer, documents.read(), 20_000)
    assert "standard library" in held_out.name and len(held_out.ids) == 20_000


def test_documents_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one two")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine words"}\n{"txt": 1}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases = [
        ("short.txt", 0, "only 2 tokens"),
        ("bad.jsonl", 1, "bad.jsonl, line 2.*'text'"),
        ("latin.txt", 0, "UTF-8"),
        ("none.txt", 0, "none.txt"),
        ("none.jsonl", 0, "none.jsonl"),
    ]
    for name, number, message in cases:
        with pytest.raises(AHNError, match=message):
            documents.tokenised(WordTokenizer(), documents.read(tmp_path / name, number), 3)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine words"}\n')
    with pytest.raises(AHNError, match="no book number 1"):
        documents.read(tmp_path / "bad.jsonl", 1)

"""The demonstration: its documents, what it measures against plain forwards, and its statistics."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy

import ahn
from ahn.demo import Document, Method, compare, make_documents, make_methods
from ahn.demo import reading as reading_module
from ahn.demo.comparison import Comparison
from ahn.demo.figure import comparison_figure
from ahn.demo.methods import FULL, WINDOW_ONLY
from ahn.errors import AHNError
from ahn.tiny.corpus import held_out_text

WINDOW, SINKS = speaking.WINDOW, speaking.SINKS
LOSSLESS = WINDOW + SINKS
LENGTH = 200


@pytest.fixture(scope="module")
def words() -> Any:
    return speaking.tokenizer()


@pytest.fixture(scope="module")
def documents(words: Any) -> list[Document]:
    made, reason = make_documents(words, held_out_text()[:2], 3, LENGTH, LOSSLESS)
    assert reason is None
    return made


@pytest.fixture(scope="module")
def comparison(words: Any, documents: list[Document]) -> Comparison:
    model = speaking.model(words)
    return compare(model, make_methods(model, []), documents)


# -- documents


def test_documents_are_real_text_with_facts(words: Any, documents: list[Document]) -> None:
    (first, second), third = held_out_text()[:2], documents[2]
    assert [document.name for document in documents[:2]] == [first[0], second[0]]
    assert third.name.startswith(f"{first[0]} from token ")
    real = [words(text)["input_ids"] for _, text in (first, second)]
    cut = 0
    for document, source in zip(documents, [*real, real[0]], strict=True):
        assert len(document.text.ids) == LENGTH
        inserted = set(document.text.inserted)
        bare = [token for n, token in enumerate(document.text.ids) if n not in inserted]
        start = len(bare) if document is third else 0
        assert bare == source[start : start + len(bare)]
        cut = len(bare)
    assert cut < LENGTH


def test_facts_beyond_are_out_of_sight(documents: list[Document]) -> None:
    for document in documents:
        beyond = document.facts_beyond(WINDOW, SINKS)
        for fact in beyond:
            stated, reads = fact.answer - fact.distance, fact.answer - 1
            visible = {*range(SINKS), *range(reads - WINDOW + 1, reads + 1)}
            assert stated not in visible
        assert document.facts_beyond(0, 0) == document.text.facts
        assert document.facts_beyond(LENGTH, 0) == document.facts_beyond(0, LENGTH) == []
    assert any(document.facts_beyond(WINDOW, SINKS) for document in documents)


def test_short_texts_are_joined_or_refused(words: Any) -> None:
    line = "value = compute(value)\n"
    short = [("a", line * 15), ("b", line * 15)]
    ((only,), _) = make_documents(words, short, 5, 200, 8)
    assert only.name == "a + b"
    with pytest.raises(AHNError, match="smaller --length"):
        make_documents(words, short, 5, 5000, 8)
    with pytest.raises(AHNError, match="--length 32 or more"):
        make_documents(words, short, 5, 31, 16)


def test_each_document_begins_as_the_base_was_trained(words: Any) -> None:
    """A base that was trained with a token before every text fails without it."""
    tokenizer = copy.deepcopy(words)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    made, _ = make_documents(tokenizer, held_out_text()[:1], 3, LENGTH, LOSSLESS)
    assert [document.text.ids.count(tokenizer.bos_token_id) for document in made] == [1, 1, 1]
    assert all(len(document.text.ids) == LENGTH and document.text.ids[0] == tokenizer.bos_token_id for document in made)
    for document in made:
        assert all(
            tokenizer.decode(document.text.ids[fact.answer]).strip() == fact.value for fact in document.text.facts
        )


def test_a_tokenizer_that_cannot_ask_leaves_facts_out(monkeypatch: pytest.MonkeyPatch, words: Any) -> None:
    monkeypatch.setattr("ahn.tiny.facts.KEYS", ("unpronounceableword", "anotherlongone"))
    made, reason = make_documents(words, held_out_text()[:1], 1, LENGTH, LOSSLESS)
    assert "splits" in str(reason) and made[0].text.facts == made[0].text.inserted == []


# -- reading


@pytest.mark.parametrize("name", [FULL, WINDOW_ONLY, "gated_deltanet"])
def test_reading_in_chunks_equals_one_forward(
    words: Any, documents: list[Document], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "CHUNK", 64)
    model = speaking.model(words)
    method = next(method for method in make_methods(model, []) if method.name == name)
    ids = documents[0].text.ids
    asked = [5, 64, 65, 150]
    sizes: list[int] = []
    with method.on(model), torch.no_grad():
        read = reading_module.read(model, ids, asked, sizes.append)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    # float32 sums in another order
    torch.testing.assert_close(
        read.losses, cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none"), rtol=1e-3, atol=1e-3
    )
    assert read.guesses == [int(logits[position - 1].argmax()) for position in asked]
    assert sizes == [64, 64, 64, 8]
    assert [tokens for tokens, _ in read.cache_bytes] == [64, 128, 192, 200]
    kv = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, bytes
    if name == FULL:
        assert read.cache_bytes == [(tokens, tokens * kv) for tokens in (64, 128, 192, 200)]
    else:
        state = 2 * 4 * 8 * 8 * 4 + LOSSLESS * 2 * 2 * 4 * 4  # the state, and two gates a head of every kept token
        assert {size for _, size in read.cache_bytes} == {LOSSLESS * kv + (state if name != WINDOW_ONLY else 0)}


def test_methods_leave_the_bare_model(words: Any) -> None:
    model = speaking.model(words)
    ids = torch.arange(40)[None]
    with torch.no_grad(), ahn.disabled(model):
        full = model(ids, use_cache=False).logits
    with torch.no_grad():
        remembered = model(ids, use_cache=False).logits
        methods = make_methods(model, [])
        assert [method.name for method in methods] == [FULL, WINDOW_ONLY, "gated_deltanet"]
        for method in (*methods, *methods):
            with method.on(model):
                logits = model(ids, use_cache=False).logits
            assert torch.equal(logits, full) == (method.name == FULL)
            assert torch.equal(logits, remembered) == method.trainable
        assert torch.equal(model(ids, use_cache=False).logits, full)


def test_adapters_of_one_kind_are_told_apart(tmp_path: Path) -> None:
    saved = speaking.save(tmp_path)
    names = [method.name for method in make_methods(ahn.from_pretrained(saved.adapter), [str(saved.adapter)])]
    assert names[2:] == ["gated_deltanet #1", "gated_deltanet #2"]


# -- statistics


def test_a_comparison_is_what_the_readings_say(words: Any, documents: list[Document], comparison: Comparison) -> None:
    model = speaking.model(words)
    losses, right, asked = {}, {}, 0
    for method in make_methods(model, []):
        kept, hits, asked = [], 0, 0
        with method.on(model):
            for document in documents:
                facts = document.facts_beyond(WINDOW, SINKS)
                read = reading_module.read(model, document.text.ids, [fact.answer for fact in facts])
                hits += sum(words.decode([g]).strip() == f.value for g, f in zip(read.guesses, facts, strict=True))
                asked += len(facts)
                kept += [
                    float(read.losses[t])
                    for t in range(LOSSLESS, LENGTH - 1)
                    if t + 1 not in set(document.text.inserted)
                ]
        losses[method.name], right[method.name] = sum(kept) / len(kept), hits
    by_name = {result.name: result for result in comparison.results}
    for name, loss in losses.items():
        result = by_name[name]
        # the same float32 losses, summed in another order
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert (result.facts_recalled, result.facts_asked) == (right[name], asked)
        assert result.is_memory == (name == "gated_deltanet")
        assert result.cache_by_position[0] == (0, 0)
    assert by_name[FULL].gap_won_back in (1.0, None) and by_name[WINDOW_ONLY].gap_won_back in (0.0, None)
    assert comparison.best_memory.name == "gated_deltanet"
    assert comparison.tokens_compared == len(kept)


def test_methods_agree_inside_the_window(comparison: Comparison) -> None:
    first = {result.loss_by_position[0] for result in comparison.results}
    assert len(first) == 1  # the first bin is what exact attention covers: the same kernel, the same bits
    assert len({result.loss_by_position[-1] for result in comparison.results}) == len(comparison.results)


def test_the_figure_shows_the_mean_and_the_range_over_documents(comparison: Comparison) -> None:
    for result in comparison.results:
        assert len(result.loss_by_document) == len(comparison.documents)
    figure = comparison_figure(comparison, "a model reads")
    assert figure.get_suptitle() == "a model reads: 3 documents, their mean"
    ranges = [shade.get_paths()[0].vertices[:, 1] for shade in figure.axes[0].collections]
    assert len(ranges) == 2, "around sinks + window and around the best memory"
    window, full = (next(r for r in comparison.results if r.name == name) for name in (WINDOW_ONLY, FULL))
    differences = [a[-1] - b[-1] for a, b in zip(window.loss_by_document, full.loss_by_document, strict=True)]
    assert min(differences) in ranges[0] and max(differences) in ranges[0]
    single = dataclasses.replace(comparison, documents=comparison.documents[:1])
    assert "1 document" in comparison_figure(single, "x").get_suptitle()


@pytest.mark.slow
def test_the_gap(words: Any, documents: list[Document]) -> None:
    """A memory that does nothing wins nothing back; and if the window loses nothing there is no gap."""
    model = speaking.model(words)
    for name, parameter in ahn.adapter_parameters(model).items():
        if "o_proj" in name:
            parameter.data.zero_()
    methods = make_methods(model, [])
    nothing = compare(model, methods, documents).results
    window, memory = nothing[1], nothing[2]
    assert memory.loss == pytest.approx(window.loss, rel=1e-6)
    assert memory.gap_won_back is None or memory.gap_won_back == pytest.approx(0, abs=1e-3)
    same = compare(model, [Method(FULL), Method(WINDOW_ONLY), methods[2]], documents).results
    assert [result.gap_won_back for result in same] == [None, None, None]

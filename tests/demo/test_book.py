"""A chat model reads a book: positions and questions."""

from __future__ import annotations

import math

import pytest
import speaking
import torch

from ahn.config import AHNConfig
from ahn.demo import book
from ahn.demo.methods import FULL, WINDOW_ONLY
from ahn.measure.method import Method

TEXT = "".join(f"The ship number {n} came into the harbour. Nobody saw it on that day in May. " for n in range(400))


def test_a_fact_stands_in_the_pages_and_its_value_follows() -> None:
    words = speaking.tokenizer(speaking.CHATML)
    first, second = book.make_questions(words, TEXT, 2, 400)
    for question in (first, second):
        shown, value = words.decode(question.ids), words.decode(question.answer).strip()
        assert len(value) == book.DIGITS and value.isdecimal()
        assert shown.count("The special magic number for the") == 2, "stated, and begun in the reply"
        assert f"is: {value}." in shown and not shown.endswith(value)
        assert 400 <= len(question.ids) <= 600
    assert "ship number 0 " in words.decode(first.ids) and "ship number 0 " not in words.decode(second.ids)


def test_an_answer_is_right_when_every_token_is() -> None:
    """Against transformers' own logits: what the model itself would say is right, another last token is wrong."""
    words = speaking.tokenizer(speaking.CHATML)
    model = speaking.ahn.detach(speaking.model(words)).eval()
    ids = words(TEXT[:300])["input_ids"]
    told = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0, len(ids) :]
    steps: list[int] = []
    assert book.answers(model, book.BookQuestion(ids, told.tolist()), steps.append)
    assert sum(steps) == len(ids) + 3
    for place in range(4):
        wrong = told.tolist()
        wrong[place] = (wrong[place] + 1) % len(words)
        assert not book.answers(model, book.BookQuestion(ids, wrong), steps.append)


def test_perplexity_and_cache_by_position() -> None:
    words = speaking.tokenizer(speaking.CHATML)
    model = speaking.ahn.detach(speaking.model(words)).eval()
    ids = words(TEXT)["input_ids"][:768]
    window = AHNConfig(memory="window_only", window=speaking.WINDOW, sinks=speaking.SINKS)
    full, exact = book.read_book(model, [Method(FULL), Method(WINDOW_ONLY, window)], ids, [], 256)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    expected = [math.exp(float(part.mean())) for part in losses.split(256)]
    assert full.perplexity == pytest.approx(expected, rel=1e-4)  # float32 sums in another order
    assert full.cache_bytes == [full.cache_bytes[0], 2 * full.cache_bytes[0], 3 * full.cache_bytes[0]]
    assert len(set(exact.cache_bytes)) == 1 and exact.cache_bytes[0] < full.cache_bytes[0]
    assert exact.perplexity[1:] != pytest.approx(full.perplexity[1:], rel=1e-4)

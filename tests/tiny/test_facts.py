"""Facts: what is inserted, where the answers are, and that the result is what tokenizing the text would give."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ahn import tiny
from ahn.errors import AHNError
from ahn.tiny.corpus import held_out_text
from ahn.tiny.facts import KEYS, VALUES, FactWriter


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def writer(tokenizer: PreTrainedTokenizerBase) -> FactWriter:
    return FactWriter(tokenizer)


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(held_out_text()[0][1])[:1500]


def test_every_word_is_one_token(writer: FactWriter) -> None:
    assert (len(KEYS), len(VALUES)) == (128, 128)
    assert list(writer.keys) == list(KEYS)
    assert list(writer.values) == list(VALUES)
    assert not set(KEYS) & set(VALUES)


@given(count=st.integers(0, 40), low=st.integers(1, 800), seed=st.integers())
def test_facts_are_where_they_say(
    tokenizer: PreTrainedTokenizerBase, writer: FactWriter, ids: list[int], count: int, low: int, seed: int
) -> None:
    text = writer.write(ids, count, random.Random(seed), min_distance=low)
    assert len(text.ids) == len(ids) + count * writer.cost
    assert [i for n, i in enumerate(text.ids) if n not in set(text.inserted)] == ids
    assert tokenizer.encode(tokenizer.decode(text.ids)) == text.ids
    assert len({fact.key for fact in text.facts}) == len(text.facts) == count
    for fact in text.facts:
        stated = fact.answer - fact.distance
        assert fact.distance >= low
        for place, word in ((stated, "note"), (fact.answer, "recall")):
            assert tokenizer.decode(text.ids[place - 4 : place + 2]) == f"# {word}: {fact.key} {fact.value}\n"


def test_seed_decides(writer: FactWriter, ids: list[int]) -> None:
    assert writer.write(ids, 9, random.Random(3)) == writer.write(ids, 9, random.Random(3))
    assert writer.write(ids, 9, random.Random(3)) != writer.write(ids, 9, random.Random(4))


def test_distances_stay_below_the_bound(writer: FactWriter, ids: list[int]) -> None:
    """A question is put at the next line start, so the bound may be exceeded by two lines and what is inserted."""
    text = writer.write(ids, 20, random.Random(0), max_distance=300)
    assert max(fact.distance for fact in text.facts) <= 300 + 20 * writer.cost + 100


def test_too_much_is_refused(writer: FactWriter, ids: list[int]) -> None:
    with pytest.raises(AHNError, match="128 keys"):
        writer.write(ids, 129, random.Random(0))
    with pytest.raises(AHNError, match="no two lines 5000 tokens apart"):
        writer.write(ids, 1, random.Random(0), min_distance=5000)
    with pytest.raises(AHNError, match="no two lines"):
        writer.write(ids[:2], 1, random.Random(0))

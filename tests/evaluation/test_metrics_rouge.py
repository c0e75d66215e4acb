"""ROUGE-L against the rouge package's numbers, a plain table, and its limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahn.evaluation.metrics.rouge import _common_words, rouge_l


def _long_text(words: int, square: int, linear: int, modulus: int) -> str:
    return " ".join(f"w{(i * i * square + i * linear) % modulus}" for i in range(words))


@pytest.mark.parametrize(
    ("words", "modulus", "predicted", "expected", "score"),
    [
        # rouge 1.0.1 under a recursion limit of 100 000. With Python's 1000 it raises: 0.0 in the scripts.
        (1500, 997, (31, 7), (17, 3), 0.11422845191382788),
        (1200, 53, (1, 1), (5, 2), 0.5185185135185185),
    ],
)
def test_long_texts_have_their_true_score(
    words: int, modulus: int, predicted: tuple[int, int], expected: tuple[int, int], score: float
) -> None:
    prediction, reference = _long_text(words, *predicted, modulus), _long_text(words, *expected, modulus)
    assert rouge_l(prediction, reference) == pytest.approx(score, abs=1e-9, rel=0)


def test_sentences_end_at_every_full_stop_and_words_count_once() -> None:
    """Shared {3, 14, pi}: 3 of the prediction's 3 words and of the reference's 4, across sentences in another order."""
    recall, precision = 3 / 4, 1.0
    expected = 2 * recall * precision / (recall + precision + 1e-8)
    assert rouge_l("pi pi 3.14", "14.pi is 3 3") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("empty", ["", ".", "..."])
def test_texts_without_a_sentence_score_zero(empty: str) -> None:
    assert rouge_l(empty, "lamp") == rouge_l("lamp", empty) == rouge_l(empty, empty) == 0.0


def test_white_space_is_one_empty_word() -> None:
    assert rouge_l(" ", "lamp") == 0.0
    assert rouge_l(" ", "\n") == pytest.approx(2 / (2 + 1e-8), abs=1e-12)


WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(WORDS, WORDS)
def test_the_walk_through_the_table(reference: list[str], candidate: list[str]) -> None:
    """The package's rule, step by step over a whole table: a match is taken, then the longer side, left when equal."""
    table = [[0] * (len(candidate) + 1) for _ in range(len(reference) + 1)]
    for i, word in enumerate(reference):
        for j, other in enumerate(candidate):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    i, j, taken = len(reference), len(candidate), []
    while i > 0 and j > 0:
        if reference[i - 1] == candidate[j - 1]:
            taken.append(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    assert len(taken) == table[-1][-1]
    assert _common_words(reference, candidate) == set(taken)


@given(WORDS, WORDS)
def test_range_and_identity(first: list[str], second: list[str]) -> None:
    a, b = " ".join(first), " ".join(second)
    assert 0 <= rouge_l(a, b) <= 1
    if first:
        assert rouge_l(a, a) == pytest.approx(1, abs=1e-8)  # the guard against 0/0 takes half of 1e-8

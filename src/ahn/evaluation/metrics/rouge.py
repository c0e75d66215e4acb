"""ROUGE-L as the `rouge` package 1.0.1 computes it, without its recursion.

LV-Eval, LongBench and the AHN paper's scripts use `Rouge().get_scores(..., avg=True)["rouge-l"]["f"]`. That package
differs from others (never substitute `rouge-score`): a sentence ends at every ".", also in "3.14"; repeated words count
once on both sides; what prediction and reference share is the union of the words on one longest common subsequence for
each pair of sentences, and where there are several it matters which one the walk back through the table finds.

The package walks back recursively. Sentences of together about a thousand words exceed Python's recursion limit, and
the benchmarks' scripts catch everything and score 0.0. Here both profiles give the true value instead: what the package
returns under a higher limit.
"""

import numpy as np

_EPSILON = 1e-8  # the package's guard against 0/0: part of every score it gives


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of ROUGE-L over words separated by white space; 0.0 when either text is empty or only full stops."""
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    shared: set[str] = set()
    for sentence in expected:
        for candidate in predicted:
            shared |= _common_words(sentence, candidate)
    precision = len(shared) / len({word for sentence in predicted for word in sentence})
    recall = len(shared) / len({word for sentence in expected for word in sentence})
    return 2.0 * (precision * recall / (precision + recall + _EPSILON))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence. A sentence of white space only is one empty word, which the package counts."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_words(reference: list[str], candidate: list[str]) -> set[str]:
    """The words on one longest common subsequence: of several, the one the package takes."""
    longer_above = _directions(reference, candidate)
    words = set()
    i, j = len(reference), len(candidate)
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            words.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif longer_above[i - 1, j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _directions(reference: list[str], candidate: list[str]) -> np.ndarray:
    """(len(reference), len(candidate)) booleans: is the common subsequence longer one word up than one word left?

    A row of the usual table, `max(above, left, above-left + equal)`, is a running maximum of what does not look left,
    because the table grows along a row; so a row is one vector operation, and only one row is kept.
    """
    numbers = {word: number for number, word in enumerate(dict.fromkeys(candidate))}
    columns = np.array([numbers[word] for word in candidate])
    above = np.zeros(len(candidate) + 1, dtype=np.int32)
    longer_above = np.empty((len(reference), len(candidate)), dtype=bool)
    for i, word in enumerate(reference):
        equal = columns == numbers.get(word, -1)
        row = np.zeros_like(above)
        np.maximum.accumulate(np.maximum(above[1:], above[:-1] + equal), out=row[1:])
        longer_above[i] = above[1:] > row[:-1]
        above = row
    return longer_above

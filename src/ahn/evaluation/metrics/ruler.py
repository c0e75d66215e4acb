"""RULER's metrics (scripts/eval/synthetic/constants.py of NVIDIA/RULER): references found literally, ignoring case."""

from __future__ import annotations

from collections.abc import Sequence

from ahn.errors import AHNError


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of references that occur in the prediction."""
    found = _found(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 when any reference occurs in the prediction, else 0: RULER's question answering."""
    return float(any(_found(prediction, references)))


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    if isinstance(references, str) or not references:
        raise AHNError(f"RULER needs a list of one or more reference strings, not {references!r}.")
    text = prediction.lower()
    return [reference.lower() in text for reference in references]

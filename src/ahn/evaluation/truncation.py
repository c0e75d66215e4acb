"""Shortening a prompt's token ids to a limit, as each profile does it. Pure functions on sequences of ids."""

from __future__ import annotations

from collections.abc import Sequence

from ahn.errors import AHNError


def middle_halves(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """What is left of the start and of the end when the middle is cut out: `int(limit / 2)` ids each.

    A prompt within the limit is all start. With an odd limit one id fewer than the limit is kept. LV-Eval
    (`truncate_prompt` in utils.py) and LongBench (pred.py) decode the halves separately and join the texts: do the
    same, because a character that the cut splits would decode differently.

    Raises:
        AHNError: the limit is below 2.
    """
    if limit < 2:  # with no half to keep the benchmarks' slice [-0:] would keep everything
        raise AHNError(f"A prompt cannot be cut to {limit} tokens: the limit must be 2 or more.")
    if len(tokens) <= limit:
        return list(tokens), []
    half = limit // 2
    return list(tokens[:half]), list(tokens[-half:])


def truncate_middle(tokens: Sequence[int], limit: int) -> list[int]:
    """Both of `middle_halves` in one list, as InfiniteBench has it (`truncate_input` in src/eval_yarn_mistral.py)."""
    first, last = middle_halves(tokens, limit)
    return first + last


def keep_last(tokens: Sequence[int], limit: int, max_new_tokens: int) -> list[int]:
    """The last `limit - max_new_tokens` ids of a prompt longer than `limit`; a shorter one as it is.

    So does the AHN paper's script for LongBench and InfiniteBench (eval/longbench/pred.py): a prompt of exactly `limit`
    ids stays whole, one with a single id more loses `max_new_tokens` as well.

    Raises:
        AHNError: nothing would be left.
    """
    kept = limit - max_new_tokens
    if kept < 1:
        raise AHNError(f"A limit of {limit} tokens leaves no prompt beside {max_new_tokens} new ones: raise the limit.")
    return list(tokens[-kept:]) if len(tokens) > limit else list(tokens)

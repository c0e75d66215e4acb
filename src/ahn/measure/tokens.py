"""Texts to token ids: what a tokenizer puts around them, and long ones so that Ctrl-C gets through."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Made = TypeVar("Made")

LONG = 1 << 16
"""Characters of a text that is tokenised in a thread of its own, so that the program can be stopped meanwhile."""
ABANDONED = "ahn-tokeniser"
"""The name of such a thread: a program that was stopped does not wait for it."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """The token ids of a text of any length.

    Args:
        special: with what the tokenizer puts before and after a text.
    """

    def tokenise() -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    return tokenise() if len(text) < LONG else in_a_thread(tokenise)


def in_a_thread(work: Callable[[], Made]) -> Made:
    """The result of a piece of work that would not let Ctrl-C through."""
    future: Future[Made] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=ABANDONED, daemon=True).start()
    return future.result()


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids before and after every text; none where the tokenizer adds none.

    Many bases were trained on texts that begin with a token of their own, and fail without it.
    """
    bare, whole = token_ids(tokenizer, "x", special=False), token_ids(tokenizer, "x")
    starts = [n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare]
    return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])

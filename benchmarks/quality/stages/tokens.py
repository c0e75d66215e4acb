"""The tokenizer: a lossless byte-level BPE in which every word of a fact is one token."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ahn.tiny.facts import KEYS, QUESTION, STATEMENT, VALUES

from .pool import Pool
from .recipe import END_OF_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Words with their leading space or mark, up to three digits, runs of marks with the newlines after them, newlines,
# indentation. A newline only ever ends a token, so lines can be inserted without changing the tokens around them.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n*|[^\S\n]*\n+|\s+(?!\S)|\s"
WORD_REPEATS = 4000  # often enough that each word of a fact becomes one token


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` tokens."""
    from transformers import PreTrainedTokenizerFast  # heavy; the processes that encode do not need it

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_fact_lines()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(file: Path, texts: Sequence[str], pool: Pool) -> list[np.ndarray]:
    """Ids (uint16) of each text with the tokenizer in `file`."""
    return pool.map(functools.partial(_encode, str(file)), texts)


@functools.cache
def _load(file: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallel part
    return Tokenizer.from_file(file)


def _encode(file: str, text: str) -> np.ndarray:
    return np.array(_load(file).encode(text, add_special_tokens=False).ids, dtype=np.uint16)


def _fact_lines() -> Iterator[str]:
    for template in (STATEMENT, QUESTION):
        for key, value in zip(KEYS, VALUES, strict=True):
            yield template.format(key=key, value=value) * (WORD_REPEATS // 2)

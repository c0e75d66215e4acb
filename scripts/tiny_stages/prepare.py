"""Stage `prepare`, on the CPU: the corpus, its tokenizer, and both as token ids in files that travel to the GPU."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ahn.tiny.corpus import held_out_text, train_documents
from ahn.tiny.facts import KEYS, QUESTION, STATEMENT, VALUES

from .recipe import END_OF_TEXT, VOCABULARY

# Words with their leading space or mark, up to three digits, runs of marks with the newlines after them, newlines,
# indentation. A newline only ever ends a token, so lines can be inserted without changing the tokens around them.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n*|[^\S\n]*\n+|\s+(?!\S)|\s"
WORD_REPEATS = 4000  # often enough that each word of a fact becomes one token


def prepare(out: Path) -> None:
    """Write out/model/ (the tokenizer), out/train.npy (ids of the training split) and out/held_out.npz (by module).

    Ids are uint16.
    """
    documents = train_documents()
    tokenizer = train_tokenizer([text for _, text in documents])
    (out / "model").mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out / "model")
    _compact(out / "model" / "tokenizer.json")

    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer([text for _, text in documents], add_special_tokens=False)["input_ids"]
    train = np.concatenate([np.array([*ids, end], dtype=np.uint16) for ids in encoded])
    held_out = {name: np.array(tokenizer.encode(text), dtype=np.uint16) for name, text in held_out_text()}
    np.save(out / "train.npy", train)
    np.savez(out / "held_out.npz", **held_out)
    characters = sum(len(text) for _, text in documents)
    summary = {
        "python": platform.python_version(),
        "vocabulary": len(tokenizer),
        "train_documents": len(documents),
        "train_characters": characters,
        "train_tokens": len(train),
        "characters_per_token": round(characters / len(train), 3),
        "held_out_tokens": {name: len(ids) for name, ids in held_out.items()},
    }
    (out / "prepare.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE of `VOCABULARY` tokens, in which every word of a fact is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
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


def _fact_lines() -> Iterator[str]:
    for template in (STATEMENT, QUESTION):
        for key, value in zip(KEYS, VALUES, strict=True):
            yield template.format(key=key, value=value) * (WORD_REPEATS // 2)


def _compact(path: Path) -> None:
    """Rewrite a JSON file without white space: the tokenizer travels in the package."""
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))

"""Stage `prepare`, on the CPU: the corpus, its tokenizer, and both as token ids in files that travel to the GPU."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .corpus import Document, Split, split
from .log import Clock, write_json
from .pool import Pool
from .recipe import END_OF_TEXT, Recipe
from .tokens import encode, train_tokenizer

DONE = "prepare.json"


def prepare(recipe: Recipe, out: Path, folders: Sequence[Path] = ()) -> None:
    """Write out/model/ (the tokenizer), out/train.npy (ids of the training split) and out/held_out.npz (by document).

    Ids are uint16. out/prepare.json, a summary, is written last.
    """
    clock, pool = Clock(), Pool()
    try:
        found = split(recipe.corpus, pool, folders)
        clock.say("read")
        tokenizer = train_tokenizer(_sample(found.train, recipe.corpus.sample), recipe.corpus.vocabulary)
        folder = out / "model"
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        _compact(folder / "tokenizer.json")
        clock.say("tokenizer trained")
        train, held_out = _encode(found, folder / "tokenizer.json", tokenizer.convert_tokens_to_ids(END_OF_TEXT), pool)
        clock.say("encoded")
    finally:
        pool.close()
    np.save(out / "train.npy", train)
    np.savez(out / "held_out.npz", **held_out)
    characters = sum(len(text) for _, pieces in found.train for text in pieces)
    summary = {
        "python": platform.python_version(),
        "vocabulary": len(tokenizer),
        "train_documents": len(found.train),
        "train_characters": characters,
        "train_tokens": len(train),
        "characters_per_token": round(characters / len(train), 3),
        "held_out_tokens": {name: len(ids) for name, ids in held_out.items()},
        "seconds": clock.seconds(),
    }
    write_json(out / DONE, summary)
    print(json.dumps(summary, indent=2))


def _sample(documents: Sequence[Document], most: int) -> list[str]:
    """Every k-th piece, so that they have at most about `most` characters together."""
    pieces = [text for _, texts in documents for text in texts]
    step = -(-sum(map(len, pieces)) // most)
    return pieces[::step]


def _encode(found: Split, file: Path, end: int, pool: Pool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All training documents one after another, each closed by `end`; and the held-out ones by name."""
    documents = [*found.train, *found.held_out]
    encoded = iter(encode(file, [text for _, texts in documents for text in texts], pool))
    joined = [np.concatenate([next(encoded) for _ in texts]) for _, texts in documents]
    closing = np.array([end], dtype=np.uint16)
    count = len(found.train)
    train = np.concatenate([part for ids in joined[:count] for part in (ids, closing)])
    return train, {name: ids for (name, _), ids in zip(found.held_out, joined[count:], strict=True)}


def _compact(path: Path) -> None:
    """Rewrite a JSON file without white space: the tokenizer travels in the package."""
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))

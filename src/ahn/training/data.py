"""The data of a run: tokenised once, in parallel, cached; bad rows counted, said and skipped."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections import Counter
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.training.losses import IGNORED
from ahn.training.settings import Settings
from ahn.training.sources import Rows, load_rows
from ahn.training.tokenise import BAD, IDLE, KEPT, SHORT, RowTokenizer

logger = logging.getLogger("ahn")

Samples: TypeAlias = Dataset | IterableDataset
COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "learn": List(Value("bool")),
        "fate": Value("string"),
        "problem": Value("string"),
        "where": Value("string"),
    }
)
MAP_ROWS = 16  # rows tokenised at once: long documents, so memory rather than calls counts
SHUFFLED = 512  # samples of a stream that are shuffled among each other
SHOWN = 5  # bad rows that are named


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples with `input_ids` and `learn`, each a list of a sample's length."""

    train: Samples
    held_out: Dataset | None


def load_data(settings: Settings, tokenizer: PreTrainedTokenizerBase, seed: int, rank: int = 0, ranks: int = 1) -> Data:
    """Training and held-out samples.

    Args:
        settings: says where data is and what is cut, left out and held out.
        tokenizer: a fast one.
        seed: of the split, and of a stream's order.
        rank, ranks: of this process; a stream is divided between them here, other samples later.

    Raises:
        AHNError: data that cannot be read, no sample that is left, or, if strict, a bad row.
    """
    check_tokenizer(tokenizer)
    tokenise = RowTokenizer(tokenizer, settings.cutoff_len, settings.shortest, settings.smallest_total, settings.strict)
    assert settings.dataset is not None
    rows = load_rows(settings.dataset, settings.streaming, settings.max_samples)
    held_out_rows: Rows | None = None
    if settings.eval_dataset:
        held_out_rows = load_rows(settings.eval_dataset, max_samples=settings.max_samples)
    elif settings.val_size:
        rows, held_out_rows = _split(rows, settings.val_size, seed)
    held_out = None if held_out_rows is None else _tokenised(held_out_rows, tokenise, settings, "held-out data")
    if held_out is not None and settings.max_eval_samples is not None:
        held_out = held_out.select(range(min(settings.max_eval_samples, len(held_out))))
    if isinstance(rows, IterableDataset):
        return Data(_stream(rows, tokenise, seed, rank, ranks), held_out)
    return Data(_tokenised(rows, tokenise, settings, "training data"), held_out)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises AHNError if the tokenizer cannot say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise AHNError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json); training needs one.")


def _split(rows: Rows, size: float, seed: int) -> tuple[Rows, Rows]:
    """Training and held-out rows; whole rows, so that no document is in both."""
    if isinstance(rows, IterableDataset):
        held_out = Dataset.from_list(list(rows.take(int(size))))
        return rows.skip(int(size)), held_out
    count = int(size) if size >= 1 else max(1, round(size * len(rows)))
    if count >= len(rows):
        raise AHNError(f"val_size {size:g} leaves no row to train on: the data has {len(rows)}.")
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _tokenised(rows: Rows, tokenise: RowTokenizer, settings: Settings, what: str) -> Dataset:
    if isinstance(rows, IterableDataset):
        rows = Dataset.from_list(list(rows))
    workers = settings.preprocessing_num_workers or min(16, os.cpu_count() or 1)
    workers = min(workers, max(1, len(rows) // MAP_ROWS))
    key = hashlib.sha256(f"{rows._fingerprint} {tokenise.key()} {tokenise.strict}".encode()).hexdigest()[:32]
    samples = rows.map(
        tokenise,
        batched=True,
        batch_size=MAP_ROWS,
        remove_columns=rows.column_names,
        features=COLUMNS,
        num_proc=workers if workers > 1 else None,
        load_from_cache_file=not settings.overwrite_cache,
        # A tokenizer changes its own pickle as it is used; this key does not.
        new_fingerprint=key,
        desc=f"tokenising {what}",
    )
    fates = np.array(samples["fate"][:])
    report(samples, Counter(fates.tolist()), settings, what)
    return samples.select(np.flatnonzero(fates == KEPT)).with_format("numpy", columns=["input_ids", "learn"])


def report(samples: Dataset, fates: Counter[str], settings: Settings, what: str) -> None:
    """Say what became of the rows.

    Raises:
        AHNError: nothing is left.
    """
    parts = [f"{fates[KEPT]:,} samples"]
    if fates[SHORT]:
        parts.append(f"{fates[SHORT]:,} of {settings.shortest} tokens or fewer left out")
    if fates[IDLE]:
        parts.append(
            f"{fates[IDLE]:,} with nothing to learn after their first {settings.smallest_total} tokens left out"
        )
    problems: list[str] = []
    if fates[BAD]:
        bad = samples.select([index for index, fate in enumerate(samples["fate"]) if fate == BAD][:SHOWN])
        problems = [f"{row['where']}: {row['problem']}" for row in bad]
        parts.append(f"{fates[BAD]:,} bad rows skipped ({'; '.join(problems)}{' …' if fates[BAD] > SHOWN else ''})")
    if not fates[KEPT]:
        raise AHNError(f"No sample is left in the {what}: {', '.join(parts)}.")
    logger.log(logging.WARNING if problems else logging.INFO, "%s: %s.", what, ", ".join(parts))


def _stream(rows: IterableDataset, tokenise: RowTokenizer, seed: int, rank: int, ranks: int) -> IterableDataset:
    """Samples without end: the rows again and again, in another order each time."""
    columns = rows.column_names or list(next(iter(rows)))
    samples = rows.map(tokenise, batched=True, batch_size=MAP_ROWS, remove_columns=columns, features=COLUMNS)
    samples = samples.filter(_Keep()).remove_columns(["fate", "problem", "where"])
    if next(iter(samples), None) is None:
        raise AHNError("No sample is left in the training data: the stream held no row to learn from.")
    samples = samples.shuffle(seed=seed, buffer_size=SHUFFLED).repeat(None)
    return split_dataset_by_node(samples, rank, ranks) if ranks > 1 else samples


class _Keep:
    """Whether a streamed sample is kept; says what is bad, more and more rarely."""

    def __init__(self) -> None:
        self.bad = 0

    def __call__(self, sample: dict[str, Any]) -> bool:
        if sample["fate"] == BAD:
            self.bad += 1
            if self.bad <= SHOWN or self.bad.bit_count() == 1:  # then at 8, 16, 32 …
                logger.warning("bad row skipped (%d up to now): %s: %s.", self.bad, sample["where"], sample["problem"])
        return sample["fate"] == KEPT


@dataclasses.dataclass(frozen=True)
class Collator:
    """Samples to one batch on the CPU, padded on the right: `input_ids`, `attention_mask`, `labels`, each (B, L)."""

    pad_token_id: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.full((len(samples), length), self.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, sample in enumerate(samples):
            own = torch.as_tensor(np.asarray(sample["input_ids"]), dtype=torch.long)
            learn = torch.as_tensor(np.asarray(sample["learn"]), dtype=torch.bool)
            ids[row, : len(own)] = own
            mask[row, : len(own)] = 1
            labels[row, : len(own)] = own.masked_fill(~learn, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lengthened(batch: dict[str, Tensor], length: int, pad_token_id: int) -> dict[str, Tensor]:
    """The batch with padding on the right up to at least `length` columns."""
    missing = length - batch["input_ids"].shape[1]
    if missing <= 0:
        return batch
    values = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    return {name: F.pad(x, (0, missing), value=values[name]) for name, x in batch.items()}

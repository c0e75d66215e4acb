"""The data of a run: tokenised once, in parallel, cached; bad rows counted, said and skipped."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError, reason
from ahn.private import fingerprint
from ahn.training.losses import IGNORED
from ahn.training.messages import WHERE
from ahn.training.settings import Settings
from ahn.training.sources import Rows, load_rows
from ahn.training.tally import SHOWN, Tally
from ahn.training.tokenise import BAD, KEPT, RowTokenizer, identity

logger = logging.getLogger("ahn")

COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "learn": List(Value("bool")),
        "fate": Value("string"),
        "problem": Value("string"),
        "where": Value("string"),
        "file": Value("string"),
        "first": Value("bool"),
        "shortened": Value("bool"),
        "unused": List(Value("string")),
    }
)
"""A sample or why there is none; `first`: it is the first of its row; `unused`: what training ignores of the row."""
SAMPLE = ["input_ids", "learn"]
MAP_ROWS = 16  # rows tokenised at once: long documents, so memory rather than calls counts
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Of a disk, of what a user may have of it, and of what a process may write to one file."""
SHUFFLED = 512  # samples of a stream that are shuffled among each other
DIGESTED = 64  # samples of a stream that its digest is of


class Stream(torch.utils.data.IterableDataset):
    """Samples without end: a stream's rows again and again, in another order each round, which seed and round fix."""

    def __init__(self, samples: IterableDataset) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            self.samples.set_epoch(number)
            sample = None
            for sample in self.samples:
                yield sample
            if sample is None:  # a worker beyond the number of shards
                return


Samples: TypeAlias = Dataset | Stream


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples with `input_ids` and `learn`, each a list of a sample's length.

    Args:
        digests: of the samples, in their order before any shuffling, and of the tokenizer.
    """

    train: Samples
    held_out: Dataset | None
    digests: dict[str, str]


@contextlib.contextmanager
def _into_cache() -> Iterator[None]:
    """Raises AHNError if the disk is full where datasets copies what it reads, of which it names no file."""
    try:
        yield
    except Exception as error:
        causes: list[BaseException] = [error]  # an error can be its own cause's cause
        while (cause := causes[-1].__cause__) is not None and cause not in causes:
            causes.append(cause)
        full = next((each for each in causes if isinstance(each, OSError) and each.errno in FULL), None)
        if full is None:
            raise
        raise AHNError(
            f"The copy of the data that datasets keeps in {datasets.config.HF_DATASETS_CACHE} cannot be written: "
            f"{reason(full)}. Make room there, or name another folder in HF_DATASETS_CACHE."
        ) from error


@_into_cache()
def load_data(settings: Settings, tokenizer: PreTrainedTokenizerBase, seed: int, rank: int = 0, ranks: int = 1) -> Data:
    """Training and held-out samples.

    Args:
        seed: of the split, and of a stream's order.
        rank, ranks: of this process; a stream is divided between them here, other samples later.

    Raises:
        AHNError: data cannot be read, hold nothing to learn, or do not fit on the disk a second time.
    """
    check_tokenizer(tokenizer)
    tokenise = RowTokenizer(tokenizer, settings.cutoff_len, settings.shortest, settings.smallest_total, settings.strict)
    assert settings.dataset is not None
    rows = load_rows(settings.dataset, settings.streaming, settings.max_samples)
    held_out_rows: list[Rows] | None = None
    if settings.eval_dataset:
        held_out_rows = load_rows(settings.eval_dataset, max_samples=settings.max_samples)
    elif settings.val_size:
        rows, held_out_rows = _split(rows, settings.val_size, seed)
    held_out = None if held_out_rows is None else _tokenised(held_out_rows, tokenise, settings, "held-out data")
    if held_out is not None and settings.max_eval_samples is not None:
        held_out = held_out.select(range(min(settings.max_eval_samples, len(held_out))))
    if settings.streaming:
        samples = _streamed(rows, tokenise)
        first: Iterable[dict[str, Any]] = samples.take(DIGESTED)
        samples = samples.shuffle(seed=seed, buffer_size=SHUFFLED)
        found: Samples = Stream(split_dataset_by_node(samples, rank, ranks) if ranks > 1 else samples)
    else:
        found = first = _tokenised(rows, tokenise, settings, "training data")
    return Data(found, held_out, {"samples": _digest(first), "tokenizer": identity(tokenizer)})


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises AHNError if the tokenizer cannot say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise AHNError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json); training needs one.")


def _split(parts: list[Rows], size: float, seed: int) -> tuple[list[Rows], list[Rows]]:
    """Training and held-out rows; whole rows, so that no document is in both."""
    if isinstance(parts[0], IterableDataset):
        return _split_stream(parts, int(size))
    total = sum(len(rows) for rows in parts)
    count = int(size) if size >= 1 else max(1, round(size * total))
    if count >= total:
        raise AHNError(f"val_size {size:g} leaves no row to train on: the data has {total}.")
    numbers = Dataset.from_dict({"row": np.arange(total)}).train_test_split(test_size=count, seed=seed)
    return _selected(parts, np.array(numbers["train"]["row"])), _selected(parts, np.array(numbers["test"]["row"]))


def _selected(parts: list[Rows], chosen: np.ndarray) -> list[Rows]:
    """Of each part the rows with these numbers, which count through all parts."""
    found, begin = [], 0
    for rows in parts:
        own = chosen[(chosen >= begin) & (chosen < begin + len(rows))] - begin
        found.append(rows.select(own))
        begin += len(rows)
    return [rows for rows in found if len(rows)]


def _split_stream(parts: list[Rows], count: int) -> tuple[list[Rows], list[Rows]]:
    held_out: list[Rows] = []
    rest: list[Rows] = []
    for rows in parts:
        taken = list(rows.take(count))
        rest.append(rows.skip(len(taken)) if taken else rows)
        held_out += [Dataset.from_list(taken)] if taken else []
        count -= len(taken)
    return rest, held_out


def _tokenised(parts: list[Rows], tokenise: RowTokenizer, settings: Settings, what: str) -> Dataset:
    tally, kept = Tally(), []
    for rows in parts:
        samples = _mapped(rows, tokenise, settings, what)
        tally.add(samples)
        kept.append(samples.select(np.flatnonzero(np.array(samples["fate"][:]) == KEPT)).select_columns(SAMPLE))
    tally.say(settings, what)
    whole = kept[0] if len(kept) == 1 else datasets.concatenate_datasets(kept)
    return whole.with_format("numpy", columns=SAMPLE)


def _mapped(rows: Dataset, tokenise: RowTokenizer, settings: Settings, what: str) -> Dataset:
    workers = settings.preprocessing_num_workers or min(16, os.cpu_count() or 1)
    workers = min(workers, max(1, len(rows) // MAP_ROWS))
    key = hashlib.sha256(f"{fingerprint(rows)} {tokenise.key()} {tokenise.strict}".encode()).hexdigest()[:32]
    return rows.map(
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


def _digest(samples: Iterable[dict[str, Any]]) -> str:
    """Of every token of samples and of what is learned, whatever files they came from."""
    digest = hashlib.sha256()
    for sample in samples:
        ids = np.asarray(sample["input_ids"], np.int32)
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        digest.update(np.packbits(np.asarray(sample["learn"], bool)).tobytes())
    return digest.hexdigest()


def _streamed(parts: list[Rows], tokenise: RowTokenizer) -> IterableDataset:
    """One round of a stream's samples, in the order of the data."""
    kept = []
    for rows in parts:
        columns = rows.column_names or list(next(iter(rows), {WHERE: ""}))
        samples = rows.map(tokenise, batched=True, batch_size=MAP_ROWS, remove_columns=columns, features=COLUMNS)
        kept.append(samples.filter(_Keep()).remove_columns([name for name in COLUMNS if name not in SAMPLE]))
    whole = kept[0] if len(kept) == 1 else datasets.concatenate_datasets(kept)
    if next(iter(whole), None) is None:
        raise AHNError("No sample is left in the training data: the stream held no row to learn from.")
    return whole


class _Keep:
    """Whether a streamed sample is kept; says what is bad, more and more rarely, and what is not used."""

    def __init__(self) -> None:
        self.bad = self.shortened = 0
        self.unused: set[str] = set()

    def __call__(self, sample: dict[str, Any]) -> bool:
        if sample["fate"] == BAD:
            self.bad += 1
            if _is_time(self.bad):
                logger.warning("bad row skipped (%d up to now): %s: %s.", self.bad, sample["where"], sample["problem"])
        if sample["shortened"]:
            self.shortened += 1
            if self.shortened.bit_count() == 1:
                logger.info("conversations shortened to cutoff_len: %d up to now.", self.shortened)
        for name in set(sample["unused"]) - self.unused:
            self.unused.add(name)
            logger.warning("training does not use %s (%s is the first row with it).", name, sample["where"])
        return sample["fate"] == KEPT


def _is_time(number: int) -> bool:
    return number <= SHOWN or number.bit_count() == 1  # then at 8, 16, 32 …


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

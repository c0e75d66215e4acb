"""Where data comes from, what is said about it, and batches."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny_run import words, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.training.data import Collator, Data, lengthened, load_data
from ahn.training.settings import Settings
from ahn.training.sources import HUB, load_rows
from ahn.training.tokenise import RowTokenizer

LONG = [{"text": words(60 + n, n)} for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase):  # type: ignore[no-untyped-def]
    def loaded(dataset: Any, **settings: Any) -> Data:
        chosen = {"cutoff_len": 128, "filter_len": 34, "preprocessing_num_workers": 1} | settings
        return load_data(Settings(model_name_or_path="x", dataset=str(dataset), **chosen), tokenizer, seed=0)

    return loaded


def lengths(samples: Any) -> list[int]:
    return [len(sample["input_ids"]) for sample in samples]


def test_forms_of_files(load: Any, tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "a.jsonl", LONG)
    array = tmp_path / "b.json"
    array.write_text("\n" + json.dumps(LONG))
    Dataset.from_list(LONG).to_parquet(tmp_path / "c.parquet")
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for number, row in enumerate(LONG):
        (folder / ("deeper" if number % 2 else ".") / f"{number:02d}.txt").write_text(row["text"])
    (folder / ".hidden.jsonl").write_text("{")
    expected = lengths(load(lines).train)
    assert len(expected) == 12
    assert lengths(load(array).train) == expected == lengths(load(tmp_path / "c.parquet").train)
    assert sorted(lengths(load(folder).train)) == sorted(expected)
    assert lengths(load(f"{lines}, {array}").train) == 2 * expected
    assert lengths(load(f"{lines},{array}", max_samples=3).train) == 2 * expected[:3]


def test_standard_library_by_name(load: Any) -> None:
    data = load("stdlib", eval_dataset="stdlib-held-out", max_samples=2, max_eval_samples=5)
    assert len(data.train) > 0 and len(data.held_out) == 5


def test_chatqa2_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, **options: Any) -> Dataset:
        asked.append((name, options["split"]))
        return Dataset.from_list([{"messages": [{"role": "user", "content": "q"}]}])

    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_rows("chatqa2").column_names == ["messages"]
    assert asked == [(HUB["chatqa2"], "train")]


def test_bad_rows_are_counted_named_and_skipped(load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*LONG, {"text": "short"}, {"text": 3}, {"messages": []}])
    with file.open("ab") as lines:
        lines.write(b"{oops\n\n\xff\n")
    with caplog.at_level(logging.INFO):
        data = load(file)
    assert len(data.train) == 12
    assert "12 samples, 1 of 34 tokens or fewer left out, 4 bad rows skipped" in caplog.text
    for problem in (
        "a.jsonl:14: text is not text",
        "a.jsonl:15: messages",
        "a.jsonl:16: not JSON",
        "a.jsonl:18: not UTF-8",
    ):
        assert problem in caplog.text
    with pytest.raises(AHNError, match=r"a.jsonl:14: text is not text"):
        load(file, strict=True)


def test_tokenised_once(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "a.jsonl", LONG)
    calls = []
    tokenise = RowTokenizer.__call__

    def counted(self: RowTokenizer, batch: Any) -> Any:
        calls.append(1)
        return tokenise(self, batch)

    monkeypatch.setattr(RowTokenizer, "__call__", counted)
    first = lengths(load(file).train)
    done = len(calls)
    assert done > 0
    assert lengths(load(file).train) == first and len(calls) == done, "from the cache"
    load(file, overwrite_cache=True)
    assert len(calls) == 2 * done
    assert max(lengths(load(file, cutoff_len=64).train)) == 64
    write_rows(file, [*LONG, *LONG])
    assert len(load(file).train) == 24, "an edited file is read again"


def test_in_parallel_as_alone(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", 4 * LONG)
    alone = load(file).train
    together = load(file, preprocessing_num_workers=2, overwrite_cache=True).train
    assert [list(row["input_ids"]) for row in together] == [list(row["input_ids"]) for row in alone]


@pytest.mark.parametrize(("size", "held"), [(0.25, 3), (0.01, 1), (4, 4)])
def test_held_out_rows_are_not_trained_on(size: float, held: int, load: Any, tmp_path: Path) -> None:
    data = load(write_rows(tmp_path / "a.jsonl", LONG), val_size=size)
    rows = [{tuple(row["input_ids"]) for row in samples} for samples in (data.train, data.held_out)]
    assert (len(rows[0]), len(rows[1])) == (12 - held, held) and not rows[0] & rows[1]


def test_a_stream_never_ends_and_is_shared_between_ranks(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*LONG, {"text": 3}])
    settings = Settings(
        model_name_or_path="x", dataset=str(file), cutoff_len=128, filter_len=34, streaming=True, val_size=2
    )
    ranks = []
    for rank in range(2):
        data = load_data(settings, tokenizer, seed=0, rank=rank, ranks=2)
        assert isinstance(data.train, IterableDataset) and data.held_out is not None and len(data.held_out) == 2
        again = iter(load_data(settings, tokenizer, seed=0, rank=rank, ranks=2).train)
        rows = [tuple(row["input_ids"]) for row, _ in zip(data.train, range(11), strict=False)]
        assert rows == [tuple(next(again)["input_ids"]) for _ in range(11)], "the same order each time"
        ranks.append(rows)
    assert len({*ranks[0][:5], *ranks[1][:5]}) == 10, "a pass over ten samples, each at one rank"
    assert "a.jsonl:13: text is not text" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "empty"),
        ("a.jsonl", b"{oops", "No sample is left in the training data: 0 samples, 1 bad rows skipped"),
        ("a.json", b"[1, 2", "not valid JSON"),
        ("a.json", b"[]", "empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"", "text is empty"),
        ("a.txt", b"too short", "34 tokens or fewer left out"),
        ("a.parquet", b"PAR1 but no more", "Cannot load the data set"),
        ("a.csv", b"a,b", "convert it to JSON lines"),
        ("folder/readme.rst", b"x", "holds no data"),
    ],
)
def test_malformed_files(name: str, content: bytes, message: str, load: Any, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(AHNError) as error:
        load(file.parent if name.startswith("folder") else file)
    assert message in str(error.value)


def test_names_that_lead_nowhere(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*name: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(AHNError, match=r"There is no file or folder .*/none.jsonl"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(AHNError, match="Cannot load the data set 'some/thing': no network"):
        load("some/thing")
    with pytest.raises(AHNError, match="empty name"):
        load("stdlib,,")
    (tmp_path / "mixed").mkdir()
    write_rows(tmp_path / "mixed" / "a.jsonl", LONG)
    (tmp_path / "mixed" / "b.txt").write_text("x")
    with pytest.raises(AHNError, match="mixes"):
        load(tmp_path / "mixed")
    with pytest.raises(AHNError, match="leaves no row to train on"):
        load(write_rows(tmp_path / "a.jsonl", LONG), val_size=12)


def test_batches_are_padded_on_the_right() -> None:
    samples = [
        {"input_ids": np.array([5, 6, 7], np.int32), "learn": np.array([False, True, True])},
        {"input_ids": np.array([8], np.int32), "learn": np.array([True])},
    ]
    batch = Collator(pad_token_id=9)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    longer = lengthened(batch, 5, pad_token_id=9)
    assert longer["input_ids"].tolist() == [[5, 6, 7, 9, 9], [8, 9, 9, 9, 9]]
    assert torch.equal(longer["labels"][:, :3], batch["labels"]) and longer["labels"][:, 3:].eq(-100).all()
    assert longer["attention_mask"].sum() == 4
    assert lengthened(batch, 3, 9) is batch

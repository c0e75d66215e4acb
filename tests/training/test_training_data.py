"""Where data comes from, what is said about it, and batches."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_run import words, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.training.data import Collator, Data, Stream, lengthened, load_data
from ahn.training.messages import WHERE
from ahn.training.records import decode, normalise
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


CHATS = [
    {"messages": [{"role": "user", "content": words(60 + n, n)}, {"role": "assistant", "content": f"reply {n}"}]}
    for n in range(6)
]


def texts_of(samples: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(list(sample["input_ids"])) for sample in samples]


@pytest.mark.slow
def test_sources_of_different_kinds(load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each has its own columns; what is held out comes from all of them."""
    lines = write_rows(tmp_path / "a.jsonl", LONG)
    Dataset.from_list(CHATS).to_parquet(tmp_path / "b.parquet")
    Dataset.from_dict({"prompt": [row["text"] for row in LONG], "response": ["7"] * 12}).to_csv(tmp_path / "c.csv")
    with caplog.at_level(logging.INFO):
        data = load(f"{lines},{tmp_path / 'b.parquet'},{tmp_path / 'c.csv'}")
    assert len(data.train) == 12 + 6 + 12
    for words_ in ("a.jsonl: 12 rows, 12 samples", "b.parquet: 6 rows, 6 samples", "c.csv: 12 rows, 12 samples"):
        assert words_ in caplog.text
    data = load(f"{lines},{tmp_path / 'b.parquet'}", val_size=8)
    assert (len(data.train), len(data.held_out)) == (10, 8)
    streamed = load(f"{lines},{tmp_path / 'b.parquet'},{tmp_path / 'c.csv'}", streaming=True, val_size=14).train
    assert len(lengths(zip_first(streamed, 16))) == 16


def zip_first(samples: Any, number: int) -> list[Any]:
    return [sample for sample, _ in zip(samples, range(number), strict=False)]


def test_packed_files_are_unpacked(load: Any, tmp_path: Path) -> None:
    expected = lengths(load(write_rows(tmp_path / "a.jsonl", LONG)).train)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert lengths(load(tmp_path / "a.jsonl.gz").train) == expected
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(LONG[3]["text"].encode()))
    assert lengths(load(tmp_path / "b.txt.gz").train) == expected[3:4]
    Dataset.from_list(LONG).to_csv(tmp_path / "c.csv")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress((tmp_path / "c.csv").read_bytes()))
    assert lengths(load(tmp_path / "c.csv.gz").train) == expected


def test_cells_of_csv_are_text(load: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = "\n".join(f"{row['text']}\t{answer}" for row, answer in zip(LONG, ("7", "None", "NA"), strict=False))
    (tmp_path / "a.tsv").write_text(f"\ufeffprompt\tresponse\n{rows}\n")
    found = texts_of(load(tmp_path / "a.tsv").train, tokenizer)
    assert [text.rpartition("assistant\n")[2] for text in found] == [f"{x}<|endoftext|>\n" for x in ("7", "None", "NA")]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_cell_may_hold_a_book(name: str, load: Any, tmp_path: Path) -> None:
    """csv's own limit is 131 072 characters."""
    pandas.DataFrame({"text": [words(30_000, 0)]}).to_csv(tmp_path / name, index=False)
    assert sum(lengths(load(tmp_path / name).train)) >= 30_000


def test_a_full_disk_under_the_cache_is_named(load: Any, tmp_path: Path) -> None:
    """datasets copies what it reads to a folder of its own, which need not be on the disk of the output."""
    rows = write_rows(tmp_path / "a.jsonl", LONG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(AHNError, match=r"datasets keeps in .* cannot be written: File too large.*_CACHE"):
            load(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(load(rows).train) == len(LONG)


def test_a_first_column_without_a_name(load: Any, tmp_path: Path) -> None:
    """As pandas writes a table with the numbers of its rows."""
    pandas.DataFrame({"text": [row["text"] for row in LONG]}).to_csv(tmp_path / "a.csv")
    assert len(load(tmp_path / "a.csv").train) == len(LONG)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "csv", "saved"])
def test_names_that_a_table_may_have_are_not_ours(
    load: Any, tmp_path: Path, kind: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Columns called bytes, form and where were taken for rows that are not decoded yet, and `where` for our own."""
    names = ("bytes", "form", "where", "file", "learn", "input_ids", "first", "problem")
    table = Dataset.from_list([{"text": words(60, n)} | dict.fromkeys(names, "json") for n in range(3)])
    path = tmp_path / f"a.{kind}"
    {"parquet": table.to_parquet, "csv": table.to_csv, "saved": table.save_to_disk}[kind](path)
    with caplog.at_level(logging.WARNING):
        data = load(path, streaming=streaming)
        assert len(list(itertools.islice(data.train, 3))) == 3
    assert "bad row" not in caplog.text
    said = "training does not use {}" if streaming else "{} (3 rows)"
    assert all(said.format(name) in caplog.text for name in names)


def test_a_table_without_rows(load: Any, tmp_path: Path) -> None:
    pandas.DataFrame({"text": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(AHNError, match=r"The data is empty: .*a.parquet"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote(streaming: bool, load: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list(LONG)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "several")
    DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "parts")
    for name in ("one", "several"):
        samples = load(tmp_path / name, streaming=streaming).train
        assert len({tuple(sample["input_ids"]) for sample in zip_first(samples, 12)}) == 12
    with pytest.raises(AHNError, match="has no part train; name one of its folders: a, b"):
        load(tmp_path / "parts")


def test_data_without_training_rows_is_read_and_said(
    load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Dataset.from_list(LONG)
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "cloned").mkdir()
    rows.to_parquet(tmp_path / "cloned" / "validation-0.parquet")
    rows.to_parquet(tmp_path / "cloned" / "test-0.parquet")
    for name, parts in (("saved", "test"), ("cloned", "validation and test")):
        with caplog.at_level(logging.INFO):
            load(tmp_path / name)
        assert f"{name} has no part train; what is read is its part {parts}." in caplog.text


def test_the_folder_of_a_cloned_data_set(load: Any, tmp_path: Path) -> None:
    """Its card is no text, its other splits are no training data; the card may say which files are what."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "README.md").write_text("# About\n" + words(60, 1))
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for name, rows in (("train-00000-of-00002", LONG[:5]), ("train-00001-of-00002", LONG[5:]), ("test-0", LONG[:1])):
        Dataset.from_list(rows).to_parquet(data / f"{name}.parquet")
    assert len(load(tmp_path).train) == 12
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-00001*\n"
        "  - split: test\n    path: data/test*\n---\n# About\n"
    )
    assert len(load(tmp_path).train) == 7


def test_what_rows_hold_besides_is_said_once(load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row | {"rejected": [], "id": n} for n, row in enumerate(CHATS)]
    with caplog.at_level(logging.INFO):
        load(write_rows(tmp_path / "a.jsonl", rows))
        load(write_rows(tmp_path / "b.jsonl", [CHATS[0] | {"tools": [{"name": "f"}]}]))
    said = [record.message for record in caplog.records if "does not use" in record.message]
    assert said == [
        "training data: what training does not use: id (6 rows).",
        "training data: what training does not use: tools, which the chat template does not show (1 rows).",
    ]


def test_shortened_conversations_are_counted(load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats = [{"prompt": words(40, 1), "response": "short"}, {"prompt": words(300, 2), "response": "kept"}]
    files = write_rows(tmp_path / "a.jsonl", chats), write_rows(tmp_path / "b.jsonl", [*CHATS, {"text": 3}])
    with caplog.at_level(logging.INFO):
        load(f"{files[0]},{files[1]}")
    assert "8 samples, 1 of them shortened to cutoff_len 128, 1 bad rows skipped (b.jsonl:7: text is not" in caplog.text
    assert "a.jsonl: 2 rows, 2 samples, 1 shortened" in caplog.text
    assert "b.jsonl: 7 rows, 6 samples, 1 bad" in caplog.text


def test_half_a_character_is_a_bad_row(load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a conversation, a text, a name, and in the name of the file itself."""
    file = tmp_path / "a\udcff\x1b.jsonl"
    half = ['{"text": "x \\ud83d"}', '{"\\ud83d": 1}', '{"messages": [{"role": "\\ud83d"}]}', '{"text": "a\\u0000"}']
    file.write_text("".join(json.dumps(row) + "\n" for row in LONG) + "\n".join(half))
    assert len(load(file).train) == 12
    for number in range(13, 17):
        assert f"a\\udcff\\x1b.jsonl:{number}: " in caplog.text
    assert "half of a surrogate pair" in caplog.text and "NUL" in caplog.text


def test_the_digest_is_of_the_samples(load: Any, tmp_path: Path) -> None:
    """The same words elsewhere have the same; another word, another order or another cutoff have not."""
    for streaming in (False, True):
        first = load(write_rows(tmp_path / "a.jsonl", LONG), streaming=streaming).digests
        Dataset.from_list(LONG).to_parquet(tmp_path / "a.parquet")
        assert load(tmp_path / "a.parquet", streaming=streaming).digests == first
        others = [LONG[::-1], [*LONG[:-1], {"text": LONG[-1]["text"] + " x"}], LONG[:-1]]
        changed = [load(write_rows(tmp_path / "b.jsonl", rows), streaming=streaming).digests for rows in others]
        changed.append(load(tmp_path / "a.jsonl", streaming=streaming, cutoff_len=64).digests)
        assert len({first["samples"], *(digests["samples"] for digests in changed)}) == 5
        assert {digests["tokenizer"] for digests in changed} == {first["tokenizer"]}


def test_rounds_of_a_stream_have_their_own_order(load: Any, tmp_path: Path) -> None:
    """Each has every sample once; the order follows from seed and round, also for the workers of a loader."""
    file = write_rows(tmp_path / "a.jsonl", LONG)
    both = [[tuple(row["input_ids"]) for row in zip_first(load(file, streaming=True).train, 36)] for _ in range(2)]
    assert both[0] == both[1]
    rounds = [tuple(both[0][start : start + 12]) for start in (0, 12, 24)]
    assert len(set(rounds)) == 3 and all(set(order) == set(rounds[0]) and len(set(order)) == 12 for order in rounds)
    loader = torch.utils.data.DataLoader(load(file, streaming=True).train, batch_size=None, num_workers=2)
    assert {tuple(map(int, row["input_ids"])) for row in zip_first(loader, 12)} == set(rounds[0])


@pytest.mark.slow
def test_standard_library_by_name(load: Any) -> None:
    data = load("stdlib", eval_dataset="stdlib-held-out", max_samples=2, max_eval_samples=5)
    assert len(data.train) > 0 and len(data.held_out) == 5


def test_chatqa2_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, **options: Any) -> Dataset:
        asked.append((name, options["split"]))
        return Dataset.from_list([{"messages": [{"role": "user", "content": "q"}]}])

    monkeypatch.setattr("datasets.load_dataset", hub)
    (rows,) = load_rows("chatqa2")
    assert rows.column_names == ["messages", WHERE] and rows[WHERE][:] == ["chatqa2:1"]
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
        assert isinstance(data.train, Stream) and data.held_out is not None and len(data.held_out) == 2
        again = iter(load_data(settings, tokenizer, seed=0, rank=rank, ranks=2).train)
        rows = [tuple(row["input_ids"]) for row, _ in zip(data.train, range(11), strict=False)]
        assert rows == [tuple(next(again)["input_ids"]) for _ in range(11)], "the same order each time"
        ranks.append(rows)
    assert len({*ranks[0][:5], *ranks[1][:5]}) == 10, "a pass over ten samples, each at one rank"
    assert "a.jsonl:13: text is not text" in caplog.text


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a " * 40}]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", f"\n{json.dumps(CHAT)}\n\n{json.dumps(CHAT)}\n", ["a.jsonl:2", "a.jsonl:4"]),
        ("a.jsonl", f"\ufeff{json.dumps(CHAT)}\n{json.dumps({'messages': CHAT})}", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.json", json.dumps([CHAT, CHAT]), ["a.json[1]", "a.json[2]"]),
        ("a.json", json.dumps([CHAT, CHAT], indent=1), ["a.json[1]", "a.json[2]"]),
        ("a.json", f"[{json.dumps(CHAT)},\n{json.dumps(CHAT)}]", ["a.json[1]", "a.json[2]"]),
        ("a.jsonl", json.dumps(CHAT), ["a.jsonl[1]"]),
        ("a.json", json.dumps(CHAT, indent=1), ["a.json[1]"]),
    ],
)
def test_a_row_may_be_the_list_of_its_messages(name: str, content: str, rows: list[str], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    (found,) = load_rows(str(file), streaming=True)
    found = list(found)
    assert [row[WHERE] for row in found] == rows
    assert [normalise(decode(row)) for row in found] == [normalise({"messages": CHAT})] * len(rows)


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
        ("a.csv", b"a,b", "empty"),
        ("a.csv", b"", "does not begin with a line of different column names"),
        ("a.csv", b"a,a\n1,2\n", "does not begin with a line of different column names"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "Cannot load the data set"),
        ("a.csv", b"a,b\n1,2,3\n", "3 cells in its first row and 2 columns: quote ','"),
        ("a.csv", b"prompt;response\n1;2\n", "apart by ';', not ','"),
        ("a.json", b'{\n "data": [{"text": "x"}]\n}', "an object over several lines: write each row in one line"),
        ("a.jsonl", b'\xef\xbb\xbf{\r\n "text": "x"\r\n}\r\n{\r\n "text": "x"\r\n}', "an object over several lines"),
        ("a.xlsx", b"PK", "convert it to JSON lines"),
        ("a.jsonl.gz", b"no archive", "Cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "Cannot read"),
        ("a.txt.gz", b"no archive", "Cannot read"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("folder/a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("folder/state.json", b"{}", "Cannot load the data set"),
        ("folder/dataset_dict.json", b"{}", "Cannot load the data set"),
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
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(AHNError, match=r"pipe.jsonl is neither a file nor a folder but a pipe or device"):
        load(tmp_path / "pipe.jsonl")
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

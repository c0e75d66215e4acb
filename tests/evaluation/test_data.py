"""Reading data: plain files and zip members, and one clear sentence with file and line for whatever is wrong."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from ahn.errors import AHNError
from ahn.evaluation import data
from ahn.evaluation.data import DataFile, DataLines

FIELDS = {"text": data.text, "answers": data.texts, "length": data.number, "note": data.optional(data.text)}
GOOD = {"text": "a", "answers": ["b", ""], "length": 3, "other": {"ignored": 1}}
PLAIN = DataFile("owner/set", "f" * 40, "rows.jsonl")


def write(directory: Path, *lines: Any) -> DataLines:
    """A plain file with these lines; what is not bytes is made JSON."""
    parts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (directory / "rows.jsonl").write_bytes(b"\n".join(parts) + b"\n")
    return DataLines(PLAIN, directory)


def test_lines_become_their_named_fields(tmp_path: Path) -> None:
    chinese = GOOD | {"text": "港口的灯", "note": "n"}
    records = list(write(tmp_path, GOOD, b"", chinese).records(FIELDS))
    assert [record.fields for record in records] == [
        {"text": "a", "answers": ("b", ""), "length": 3, "note": None},
        {"text": "港口的灯", "answers": ("b", ""), "length": 3, "note": "n"},
    ]
    assert records[1].where == f"{tmp_path}/rows.jsonl, line 3"


WRONG: dict[str, tuple[Any, str]] = {
    "missing field": ({"text": "a", "answers": ["b"]}, "the field 'length' is missing."),
    "empty answers": (GOOD | {"answers": []}, "the field 'answers' must not be empty."),
    "blank answers": (GOOD | {"answers": ["", " "]}, "the field 'answers' must not be empty."),
    "answers as text": (GOOD | {"answers": "b"}, "the field 'answers' must be a list of texts."),
    "answers of numbers": (GOOD | {"answers": ["b", 2]}, "the field 'answers' must be a list of texts."),
    "number as text": (GOOD | {"length": "3"}, "the field 'length' must be a whole number, not text."),
    "number as truth": (GOOD | {"length": True}, "the field 'length' must be a whole number, not true or false."),
    "text as null": (GOOD | {"text": None}, "the field 'text' must be text, not null."),
    "optional of another kind": (GOOD | {"note": ["n"]}, "the field 'note' must be text, not a list."),
    "no object": ([1], "must be a JSON object, not a list."),
    "broken JSON": (b'{"text": "a"', "not valid JSON (Expecting ',' delimiter at character "),
    "no UTF-8": (b'{"text": "\xff"}', "not valid JSON in UTF-8 ("),
}


@pytest.mark.parametrize(("line", "message"), WRONG.values(), ids=WRONG.keys())
def test_malformed_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    source = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(AHNError) as caught:
        list(source.records(FIELDS))
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl, line 2: {message}")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(AHNError, match=r"rows\.jsonl holds no samples"):
        list(write(tmp_path, b"", b"  ").records(FIELDS))
    with pytest.raises(AHNError, match=r"other\.zip is missing: --data-dir must hold other\.zip of .* owner/set"):
        DataLines(DataFile("owner/set", "f" * 40, "other.zip"), tmp_path)


def archive(directory: Path, **members: bytes) -> Path:
    path = directory / "all.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(f"all/{name}.jsonl", content)
    return path


def test_one_member_and_no_other(tmp_path: Path) -> None:
    rows = {name: json.dumps(GOOD | {"text": name}).encode() + b"\n" for name in ("short", "long", "longer")}
    archive(tmp_path, **rows)
    source = DataLines(DataFile("owner/set", "f" * 40, "all.zip", "all/long.jsonl"), tmp_path)
    assert [record.fields["text"] for record in source.records(FIELDS)] == ["long"]
    assert source.settings()["member"] == "all/long.jsonl"
    with pytest.raises(AHNError, match=r"all\.zip has no member all/absent\.jsonl"):
        list(DataLines(DataFile("owner/set", "f" * 40, "all.zip", "all/absent.jsonl"), tmp_path).records(FIELDS))


def test_an_archive_may_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "long.jsonl").write_text(json.dumps(GOOD | {"text": "unpacked"}) + "\n[]\n")
    records = DataLines(DataFile("owner/set", "f" * 40, "all.zip", "all/long.jsonl"), tmp_path).records(FIELDS)
    assert next(records).fields["text"] == "unpacked"
    with pytest.raises(AHNError, match=r"all/long\.jsonl, line 2: must be a JSON object"):
        next(records)
    archive(tmp_path, long=json.dumps(GOOD).encode())
    packed = DataLines(DataFile("owner/set", "f" * 40, "all.zip", "all/long.jsonl"), tmp_path)
    assert packed.path.name == "all.zip" and [record.fields["text"] for record in packed.records(FIELDS)] == ["a"]


def test_errors_in_a_member_name_archive_member_and_line(tmp_path: Path) -> None:
    archive(tmp_path, rows=json.dumps(GOOD).encode() + b"\n{}\n")
    source = DataLines(DataFile("owner/set", "f" * 40, "all.zip", "all/rows.jsonl"), tmp_path)
    with pytest.raises(AHNError, match=r"all\.zip \(all/rows\.jsonl\), line 2: the field 'text' is missing"):
        list(source.records(FIELDS))


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "no archive"])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: str) -> None:
    path = archive(tmp_path, rows=b"".join(json.dumps(GOOD | {"length": i}).encode() + b"\n" for i in range(500)))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-30]
    elif damage == "a flipped bit":
        content[len(content) // 2] ^= 4
    else:
        content[:] = b"<html>not found</html>"
    path.write_bytes(content)
    source = DataLines(DataFile("owner/set", "f" * 40, "all.zip", "all/rows.jsonl"), tmp_path)
    # A flipped bit can also end in text that is no JSON, which is named too.
    with pytest.raises(AHNError, match=r"all\.zip \(all/rows\.jsonl\)"):
        list(source.records(FIELDS))


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    found = write(tmp_path, GOOD).sha256
    assert found == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    pinned = DataFile("owner/set", "f" * 40, "rows.jsonl", sha256=found)
    assert DataLines(pinned, tmp_path).settings()["sha256"] == found
    write(tmp_path, GOOD | {"text": "changed"})
    with pytest.raises(AHNError, match=rf"rows\.jsonl is not rows\.jsonl of owner/set at f+: expected sha256 {found}"):
        DataLines(pinned, tmp_path)


def test_the_hub_is_asked_for_the_pinned_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    asked = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(list(DataLines(PLAIN, None).records(FIELDS))) == 1
    pinned = {"repo_type": "dataset", "revision": "f" * 40, "allow_patterns": ["rows.jsonl"]}
    assert asked == [(("owner/set",), pinned)]
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(AHNError, match=r"cannot be downloaded \(it is not there\)"):
        DataLines(PLAIN, None)


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(AHNError, match=r"cannot be downloaded \(no route\)\. .* with --data-dir"):
        DataLines(PLAIN, None)


def test_a_context_key_tells_texts_apart() -> None:
    assert data.key_of("a") == data.key_of("a") != data.key_of("b")
    assert len(data.key_of("\ud800")) == 16  # what JSON can hold and UTF-8 cannot

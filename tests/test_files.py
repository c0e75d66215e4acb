"""Files appear whole or not at all, and what killed runs leave behind is cleared."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ahn
from ahn import AHNError, files
from ahn.files import check_folder, json_object, read_json, replacing, staged, write_json, write_tensors, write_text

LINK = ".link.12345678.ahn.partial"
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "x" * 100_000),
    "json": lambda path: write_json(path, {"x": "y" * 100_000}),
    "tensors": lambda path: write_tensors(path, {"x": torch.zeros(30_000)}, {"format": "pt"}),
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return WRITERS[request.param]


def killed(target: Path, kind: str) -> None:
    """Another process begins to write `target` and is killed amid it."""
    program = (
        f"import sys, time; from pathlib import Path; from ahn.files import replacing, staged\n"
        f"with {'replacing(Path(sys.argv[1]))' if kind == 'file' else 'staged(Path(sys.argv[1]), 0)'} as path:\n"
        f"    (path / 'half' if path.is_dir() else path).write_text('half')\n"
        f"    print('ready', flush=True)\n"
        f"    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_next_write_clears_what_a_killed_one_left(tmp_path: Path, kind: str) -> None:
    killed(tmp_path / "one", kind)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".one.") and list(left.iterdir())  # it really was amid it
    write_text(tmp_path / "third", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["third"]


def test_only_left_overs_of_ours_that_nobody_writes_are_cleared(tmp_path: Path) -> None:
    others = [".hidden", ".model.tmp", ".a.partial", ".b.12345678.partial", "c.12345678.ahn.partial", ".d.ahn.partial"]
    for name in others:
        (tmp_path / name).write_text("not ours")
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept too").mkdir()
    (tmp_path / LINK).symlink_to(tmp_path / "kept too")
    ready, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        with replacing(tmp_path / "slow") as path:
            ready.set()
            go_on.wait(60)
            path.write_text("slow but alive")

    thread = threading.Thread(target=slow)
    thread.start()
    ready.wait(60)
    write_text(tmp_path / "quick", "quick")
    go_on.set()
    thread.join()
    assert (tmp_path / "slow").read_text() == "slow but alive"
    assert {path.name for path in tmp_path.iterdir()} == {*others, "kept", "kept too", "slow", "quick", LINK}


def test_a_name_taken_before_it_was_locked_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = files._lock, []

    def late(directory: Path) -> int | None:
        if not taken:
            taken.append(directory)
            directory.rmdir()
        return lock(directory)

    monkeypatch.setattr(files, "_lock", late)
    write_text(tmp_path / "file", "whole")
    assert len(taken) == 1 and (tmp_path / "file").read_text() == "whole"


def test_a_name_that_another_is_about_to_remove_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has taken the new directory for a left-over and locked it, and removes it while the writer writes."""
    lock, taken = files._lock, list[tuple[Path, int | None]]()

    def late(path: Path) -> int | None:
        if not taken:
            taken.append((path, lock(path)))
        return lock(path)

    monkeypatch.setattr(files, "_lock", late)
    with replacing(tmp_path / "file") as temporary:
        (path, handle), *_ = taken
        shutil.rmtree(path)
        files._unlock(handle)
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_users_umask(tmp_path: Path, write: Callable[[Path], object], umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
        with staged(tmp_path / "directory", 0) as directory:
            write(directory / "file")
    finally:
        os.umask(before)
    inside = tmp_path / "directory" / "file"
    for path, full in ((tmp_path / "file", 0o666), (tmp_path / "directory", 0o777), (inside, 0o666)):
        assert path.stat().st_mode & 0o777 == full & ~umask


def test_a_full_disk_is_one_error_and_leaves_the_old_file(tmp_path: Path, write: Callable[[Path], object]) -> None:
    (tmp_path / "file").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the kernel refuses every byte after these
    try:
        with pytest.raises(ahn.AHNError, match=r"Writing .*file failed.*unchanged"):
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_fails_amid_a_block_leaves_nothing(tmp_path: Path) -> None:
    for manager in (replacing(tmp_path / "file"), staged(tmp_path / "directory", 0)):
        with pytest.raises(KeyboardInterrupt), manager as path:
            (path / "inside" if path.is_dir() else path).write_text("half")
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "absent" / "file", tmp_path / "file" / "inside", tmp_path / ("x" * 300)):
        with pytest.raises(ahn.AHNError, match="failed"):
            write_text(path, "text")
    with pytest.raises(ahn.AHNError, match="failed"), staged(tmp_path / "file" / "inside", 0):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        (b"{\xff}", "UTF-8"),
    ],
)
def test_json_that_may_hold_anything(tmp_path: Path, text: str | bytes, words: str) -> None:
    raw = text.encode() if isinstance(text, str) else text
    (tmp_path / "file.json").write_bytes(raw)
    with pytest.raises(ahn.AHNError, match=words):
        read_json(tmp_path / "file.json")
    with pytest.raises(ahn.AHNError):
        json_object(raw, "somewhere")


def test_json_that_is_absent_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ahn.AHNError, match=r"has no file\.json"):
        read_json(tmp_path / "file.json")
    with (tmp_path / "file.json").open("wb") as file:
        file.truncate(files.MAX_JSON + 1)
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(ahn.AHNError, match="is not read"):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize("name", ["file", "file/deeper", "x" * 300])
def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ahn.AHNError, match=r"is a file|cannot be written"):
        check_folder(tmp_path / name)
    check_folder(tmp_path / "new" / "deeper")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "trying leaves nothing"


def test_a_directory_may_be_named_through_itself(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with staged(out / ".." / "out", 1) as directory:
        (directory / "whole").write_text("")
    assert [path.name for path in out.iterdir()] == ["whole"]


@pytest.mark.parametrize("path", ["https://example.com/book.txt", Path("https://example.com/a"), "s3://x/y"], ids=str)
def test_an_address_is_no_path(path: str | Path) -> None:
    """As a path it lost a slash, and no file of that name was found."""
    with pytest.raises(AHNError, match=r"://[exy].* is an address, and nothing is read from there: download it"):
        files.expanded(path)

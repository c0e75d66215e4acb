"""What was said is kept, found again, forked and forgotten, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from ahn.errors import AHNError
from ahn.serve.api.messages import FILE, MessageStore


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def test_turns_form_a_tree() -> None:
    store = MessageStore(None)
    store.add("o", "a", said("1"))
    store.add("o", "b", said("2"), "a", {"id": "b"})
    store.add("o", "c", said("3"), "a")
    assert store.messages("o", "b") == said("1", "2") and store.messages("o", "c") == said("1", "3")
    assert store.shown("o", "b") == {"id": "b"} and store.shown("o", "a") is None
    assert store.messages("other", "b") is None and store.messages("o", "x") is None


def test_what_is_deleted_stays_only_for_those_that_go_on_from_it() -> None:
    store = MessageStore(None)
    store.add("o", "a", said("1"))
    store.add("o", "b", said("2"), "a")
    assert store.delete("o", "a") and not store.delete("o", "a") and not store.delete("other", "b")
    assert store.messages("o", "a") is None and store.messages("o", "b") == said("1", "2")
    assert store.delete("o", "b")
    assert store._one("SELECT COUNT(*) FROM turns") == (0,) and store._bytes == 0


def test_nothing_goes_on_from_what_is_gone() -> None:
    store = MessageStore(None)
    with pytest.raises(AHNError, match="deleted"):
        store.add("o", "b", said("2"), "a")


def test_a_session_that_starts_anew_leaves_nothing_behind() -> None:
    store = MessageStore(None)
    store.add("o", "a", said("1"), session="s")
    store.add("o", "b", said("2"), "a", session="s")
    store.add("o", "c", said("3"), session="s")
    assert store.head("o", "s") == "c" and store._one("SELECT COUNT(*) FROM turns") == (1,)
    assert store.close_session("o", "s") and not store.close_session("o", "s")
    assert store._one("SELECT COUNT(*) FROM turns") == (0,) and store._bytes == 0


def test_the_least_recently_used_conversations_go_first() -> None:
    store = MessageStore(None, limit=550)
    store.add("o", "a", said("x" * 100), session="s")
    store.add("o", "b", said("y" * 100))
    store.add("o", "a2", said("x"), "a", session="s")
    for name in "cd":
        store.add("o", name, said("z" * 100))
    assert store.messages("o", "b") is None and store.messages("o", "a") is not None
    assert store.messages("o", "d") is not None and store._bytes <= 550


def test_servers_share_what_was_said_and_its_bounds(tmp_path: Path) -> None:
    one, other = MessageStore(tmp_path, limit=500), MessageStore(tmp_path, limit=500)
    one.add("o", "a", said("1"), session="s")
    other.add("o", "b", said("2"), "a", session="s")
    assert one.head("o", "s") == "b" and one.messages("o", "b") == said("1", "2")
    for number in range(8):
        (one, other)[number % 2].add("o", f"c{number}", said("x" * 100))
    assert other._sum() <= 500 and other.messages("o", "c7") is not None and one.messages("o", "b") is None


def test_old_conversations_go() -> None:
    store = MessageStore(None, age=0.05)
    store.add("o", "a", said("1"))
    time.sleep(0.1)
    store.add("o", "b", said("2"))
    assert store.messages("o", "a") is None and store.messages("o", "b") is not None


def test_what_is_too_old_is_not_read_either(tmp_path: Path) -> None:
    """Nobody may write for days: what is too old is gone then too, and from the disk when the server starts."""
    store = MessageStore(tmp_path, age=0.05)
    store.add("o", "a", said("1"), shown={"id": "a"}, session="s")
    time.sleep(0.1)
    assert store.messages("o", "a") is None and store.shown("o", "a") is None
    assert MessageStore(tmp_path, age=0.05)._one("SELECT COUNT(*) FROM turns") == (0,)


@pytest.mark.parametrize("turn", ["a", "b"])
def test_a_session_whose_turn_was_deleted_can_be_closed(turn: str) -> None:
    store = MessageStore(None)
    store.add("o", "a", said("1"), session="s")
    store.add("o", "b", said("2"), "a", session="s")
    assert store.delete("o", turn)
    assert store.close_session("o", "s") == (turn == "a") and store.head("o", "s") is None


def test_a_full_disk_is_one_error_and_nothing_half_done(tmp_path: Path) -> None:
    store = MessageStore(tmp_path)
    store.add("o", "a", said("1"))
    store._db.execute("PRAGMA max_page_count=1")  # SQLite says that the disk is full
    with pytest.raises(AHNError, match="full"):
        store.add("o", "b", said("x" * 100_000), "a")
    assert store.messages("o", "b") is None and store.messages("o", "a") == said("1")


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all, but long enough to be looked at " * 100)
    with pytest.raises(AHNError, match="Move it away"):
        MessageStore(tmp_path)


def test_a_killed_process_leaves_every_turn_that_it_finished(tmp_path: Path) -> None:
    writer = (
        "import sys, pathlib; from ahn.serve.api.messages import MessageStore\n"
        "store = MessageStore(pathlib.Path(sys.argv[1])); parent = None\n"
        "for n in range(10**6):\n"
        "    store.add('o', f't{n}', [{'role': 'user', 'content': str(n) * 100}], parent, session='s')\n"
        "    parent = f't{n}'; print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = -1
    while last < 20:
        last = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    last = max([last, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    store = MessageStore(tmp_path)
    head = store.head("o", "s")
    assert head is not None and int(head[1:]) >= last
    messages = store.messages("o", head)
    assert messages is not None and [m["content"] for m in messages] == [str(n) * 100 for n in range(len(messages))]
    assert len(messages) == int(head[1:]) + 1

"""Conversations between two requests: found again, forked, forgotten, and on disk."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Letters, alone, ask, engine, model, prompt, request, whole
from test_engine import Ending

from ahn import AHNCache, AHNError
from ahn.cache import file as conversation_file
from ahn.cache.origin import origin
from ahn.serve.engine import files
from ahn.serve.engine.engine import Engine
from ahn.serve.engine.prompts import APART, PromptReader

OF = model(quantized=6)


def seldom(*values: str) -> list[Any]:
    """Parameters of slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def later(ids: Sequence[int], reply: Sequence[int], more: int = 5) -> list[int]:
    """The next turn of a conversation."""
    return [*ids, *reply, *prompt(more, seed=len(ids) + len(reply))]


# -- in memory ---------------------------------------------------------------------------------------------------------


def test_turn_after_turn_reads_what_is_new_alone() -> None:
    with engine(OF) as running:
        ids, read = prompt(50), 49
        for turn in range(3):
            before = running.stats().tokens_read
            got = ask(running, ids, 4)
            assert got.tokens == alone(OF, ids, 4)
            # The state has read all but the last token that was written.
            assert running.stats().tokens_read - before == read and got.cached == (len(ids) - 1 - read if turn else 0)
            ids, read = later(ids, got.tokens), 5


def test_a_state_can_be_gone_on_from_more_than_once() -> None:
    with engine(OF) as running:
        first = ask(running, prompt(50), 4)
        for seed in range(3):
            ids = [*prompt(50), *first.tokens, *prompt(4, seed=seed)]
            got = ask(running, ids, 6)
            assert got.cached == 53 and got.tokens == alone(OF, ids, 6)


def test_many_forks_have_few_copies_beside_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, right = 0, PromptReader.ready

    def counted(self: PromptReader, readings: Sequence[Any]) -> list[Any]:
        nonlocal most
        ready = right(self, readings)
        most = max(most, sum(reading.cache is not None and not reading.lent for reading in readings))
        return ready

    with engine(OF, conversations=12, state_dir=tmp_path, state_bytes=0) as running:
        first = ask(running, prompt(50), 4)
        forks = [[*prompt(50), *first.tokens, *prompt(3, seed=seed)] for seed in range(12)]
        monkeypatch.setattr(PromptReader, "ready", counted)
        for state in running.store._index:
            state.cache = None
        got = [whole(reply) for reply in [running.submit(request(ids, 6)) for ids in forks]]
    assert 0 < most <= APART
    assert [(one.cached, one.tokens) for one in got] == [(53, alone(OF, ids, 6)) for ids in forks]


def test_a_reply_can_be_written_again() -> None:
    with engine(OF) as running:
        assert ask(running, prompt(60), 4, temperature=2.0).cached == 0
        got = ask(running, prompt(60), 4)
        assert got.cached == 59 and got.tokens == alone(OF, prompt(60), 4)


def test_several_replies_to_one_prompt_read_it_once() -> None:
    with engine(OF, conversations=3) as running:
        replies = [running.submit(request(prompt(200), 4, temperature=1.0, seed=n)) for n in range(5)]
        got = [whole(reply) for reply in replies]
        assert running.stats().tokens_read == 199
        assert [one.cached for one in got] == [0, 199, 199, 199, 199]
        assert len({tuple(one.tokens) for one in got}) > 1


def test_questions_about_one_document_read_it_once() -> None:
    document = prompt(300)
    asked = [document + prompt(7, seed=n) for n in range(1, 4)]
    with engine(OF) as running:
        got = [whole(reply) for reply in [running.submit(request(ids, 4)) for ids in asked]]
        assert running.stats().tokens_read == 300 + 3 * 6
    assert [one.tokens for one in got] == [alone(OF, ids, 4) for ids in asked]


def test_where_prompts_part_is_learned() -> None:
    document = prompt(300)
    with engine(OF) as running:
        cached = [ask(running, document + prompt(9, seed=n), 3).cached for n in range(1, 5)]
    # The first reads all. The second sees, in blocks of 64, where they part, and the others begin there.
    assert cached == [0, 0, 256, 256]


def test_the_first_is_cancelled_and_the_others_go_on() -> None:
    with engine(OF, conversations=2) as running:
        first, second = (running.submit(request(prompt(700), 3)) for _ in range(2))
        next(iter(first))
        first.cancel()
        assert whole(first).finish == "cancelled"
        assert whole(second).finish == "length"


def test_owners_see_their_own_alone() -> None:
    with engine(OF) as running:
        ask(running, prompt(60), 4, owner="a", name="mine")
        assert ask(running, prompt(60), 4, owner="b").cached == 0
        assert ask(running, prompt(60), 4, owner="a").cached == 59
        assert {info.name for info in running.store.conversations("a")} == {"mine", None}
        assert (
            all(info.name is None for info in running.store.conversations("b"))
            and running.store.conversations("c") == []
        )
        assert (
            not running.store.forget("b", "mine")
            and running.store.forget("a", "mine")
            and not running.store.forget("a", "mine")
        )
        assert running.store.conversations("a") == []
        assert ask(running, prompt(60), 4, owner="a").cached == 0
        both = [running.submit(request(prompt(100), 3, owner=owner)) for owner in "xy"]
        assert [whole(reply).cached for reply in both] == [0, 0]


def test_what_is_not_to_be_kept_is_not() -> None:
    with engine(OF) as running:
        ask(running, prompt(60), 4, keep=False, name="none")
        assert running.stats().in_memory == 0 and ask(running, prompt(60), 4).cached == 0
        assert ask(running, prompt(60), 4, keep=False).cached == 59


def test_memory_is_bounded_and_the_latest_stay() -> None:
    with engine(OF) as running:
        one = ask(running, prompt(60), 4).finish and running.store.conversations("")[0]
    assert one
    size = sum(one.parts.values())
    with engine(OF, state_bytes=4 * size) as running:
        for seed in range(6):
            ask(running, prompt(60, seed=seed), 4)
        until = time.monotonic() + 5
        while running.stats().bytes_in_memory > 4 * size and time.monotonic() < until:
            time.sleep(0.01)
        assert running.stats().bytes_in_memory <= 4 * size and running.stats().evicted > 0
        assert ask(running, prompt(60, seed=5), 1).cached == 59 and ask(running, prompt(60, seed=0), 1).cached == 0


def test_what_was_not_used_for_long_is_forgotten() -> None:
    with engine(OF, max_age=0.2) as running:
        ask(running, prompt(60), 4)
        until = time.monotonic() + 5
        while running.stats().in_memory and time.monotonic() < until:
            time.sleep(0.05)
        assert running.stats().in_memory == 0


# -- replies that come back in other tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [None, 3])
def test_a_reply_is_known_as_it_will_be_sent(end: int | None) -> None:
    """A template closes a reply; the next prompt begins with prompt, reply and that."""
    written = alone(OF, prompt(50), 8)
    tokenizer = Letters() if end is None else Ending(written[end])
    said = written[: end or 8]
    asked: list[list[int]] = []

    def known(reply: Sequence[int]) -> list[int]:
        asked.append(list(reply))
        return [*prompt(50), *reply]

    running = Engine(OF, tokenizer, conversations=2)  # type: ignore[arg-type]
    running.start()
    ask(running, prompt(50), 8, known_as=known)
    assert asked == [said]
    ids = [*prompt(50), *said, 9, *prompt(5, seed=1)]
    got = ask(running, ids, 4)
    running.close()
    assert got.cached == 50 + len(said) and got.tokens == alone(OF, ids, 4)[: len(got.tokens)]


@pytest.mark.parametrize("change", ["shorter", "other", *seldom("longer", "prompt")])
def test_other_tokens_than_were_written_are_read_again(change: str) -> None:
    def known(reply: Sequence[int]) -> list[int]:
        end = {"shorter": [*reply[:-3]], "other": [4, *reply[2:]], "longer": [*reply, 8, 9], "prompt": []}[change]
        return [*prompt(50), *end]

    with engine(OF) as running:
        got = ask(running, prompt(50), 8, known_as=known)
        ids = [*known(got.tokens), *prompt(5, seed=1)]
        after = ask(running, ids, 4)
        assert after.cached == len(known(got.tokens)) and after.tokens == alone(OF, ids, 4)


def test_a_template_that_fails_costs_a_reading(caplog: pytest.LogCaptureFixture) -> None:
    def known(reply: Sequence[int]) -> list[int]:
        raise RuntimeError("no such role")

    with engine(OF) as running, caplog.at_level(logging.WARNING):
        got = ask(running, prompt(50), 8, known_as=known)
        assert got.finish == "length" and "no such role" in caplog.text
        assert ask(running, later(prompt(50), got.tokens), 2).cached == 57


def test_after_a_stop_text_the_state_has_read_what_was_shown() -> None:
    written = alone(OF, prompt(50), 10)
    stop = Letters().decode(written[4:7])
    with engine(OF) as running:
        got = ask(running, prompt(50), 10, stop=(stop,))
        assert got.finish == "stop" and len(got.text) == 4
        ids = [*prompt(50), *written[:4], *prompt(5, seed=1)]
        after = ask(running, ids, 4)
        assert after.cached == 54 and after.tokens == alone(OF, ids, 4)


# -- on disk -----------------------------------------------------------------------------------------------------------


def state_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("states-*/*.safetensors"))


def test_a_finished_turn_is_on_disk_before_its_last_delta(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path) as running:
        for n in range(3):
            ask(running, prompt(60, seed=n), 4)
            assert len(state_files(tmp_path)) == n + 1


def test_a_restart_keeps_conversations(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path) as running:
        got = ask(running, prompt(60), 4, owner="me", name="talk")
    with engine(OF, state_dir=tmp_path) as running:
        (info, *_) = [info for info in running.store.conversations("me") if info.name]
        assert (info.name, info.tokens, info.where) == ("talk", 63, "disk") and sum(info.parts.values()) > 0
        ids = later(prompt(60), got.tokens)
        after = ask(running, ids, 5, owner="me")
        assert after.cached == 63 and after.tokens == alone(OF, ids, 5)
        assert running.store.forget("me", "talk")
    with engine(OF, state_dir=tmp_path) as running:
        assert all(info.name is None for info in running.store.conversations("me"))


def test_what_leaves_memory_comes_back_from_disk(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path, state_bytes=1) as running:
        got = [ask(running, prompt(60, seed=n), 4) for n in range(4)]
        for n, one in enumerate(got):
            ids = later(prompt(60, seed=n), one.tokens)
            after = ask(running, ids, 4)
            assert after.cached == 63 and after.tokens == alone(OF, ids, 4)


def test_files_are_bounded(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path, disk_bytes=1) as running:
        for n in range(3):
            ask(running, prompt(60, seed=n), 4)
            assert len(state_files(tmp_path)) == 1


def test_two_engines_share_a_folder(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path) as one, engine(OF, state_dir=tmp_path) as other:
        got = ask(one, prompt(60), 4, name="talk")
        after = ask(other, later(prompt(60), got.tokens), 4, name="talk")
        assert after.cached == 63
        assert one.store.forget("", "talk")
        assert other.store.named("", "talk") is None


@pytest.mark.parametrize("fault", ["torn", "flipped", "other", *seldom("empty", "nonsense")])
def test_a_damaged_file_is_set_aside(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    with engine(OF, state_dir=tmp_path) as running:
        got = ask(running, prompt(60), 4)
    for file in state_files(tmp_path):
        content = file.read_bytes()
        changed = bytearray(content)
        changed[-10] ^= 1
        file.write_bytes({"torn": content[:-100], "flipped": bytes(changed), "empty": b""}.get(fault, b"nonsense"))
        if fault == "other":
            cache = AHNCache.for_model(OF)
            with torch.no_grad():
                OF(torch.tensor([prompt(5)]), past_key_values=cache)
            cache.save(file)
    with caplog.at_level(logging.WARNING), engine(OF, state_dir=tmp_path) as running:
        ids = later(prompt(60), got.tokens)
        after = ask(running, ids, 4)
        assert after.cached == 0 and after.tokens == alone(OF, ids, 4)
        assert "set aside" in caplog.text
    assert list(tmp_path.glob("states-*/*.damaged"))


@pytest.mark.parametrize("place", ["folder", "header", "file"])
def test_what_cannot_be_read_now_is_not_lost(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many files are open for a moment, or the network makes a pause."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with engine(OF, state_dir=tmp_path) as running:
        got = ask(running, prompt(60), 4)
        if place == "folder":
            monkeypatch.setattr(Path, "iterdir", fail)
            (next(tmp_path.glob("states-*")) / "other").touch()
            running.store.conversations("")
            assert ask(running, later(prompt(60), got.tokens), 4).cached == 63
            return
    if place == "header":
        monkeypatch.setattr(conversation_file, "safe_open", fail)
    with engine(OF, state_dir=tmp_path) as running:
        monkeypatch.setattr(conversation_file, "safe_open", fail)
        assert ask(running, later(prompt(60), got.tokens), 1, keep=False).cached == 0
    monkeypatch.undo()
    with engine(OF, state_dir=tmp_path) as running:
        assert ask(running, later(prompt(60), got.tokens), 4).cached == 63


def test_files_of_another_model_are_left_alone(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path) as running:
        ask(running, prompt(60), 4)
    before = state_files(tmp_path)
    with engine(model(quantized=6, seed=1), state_dir=tmp_path) as running:
        assert ask(running, prompt(60), 4).cached == 0
    with engine(model(quantized=12), state_dir=tmp_path) as running:
        assert ask(running, prompt(60), 4).cached == 0
    assert set(before) <= set(state_files(tmp_path))


def test_a_full_disk_costs_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise AHNError("No space left on device")

    with engine(OF, state_dir=tmp_path) as running, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(files.file, "write", full)
        got = ask(running, prompt(60), 4)
        assert got.finish == "length" and "No space left" in caplog.text
        assert ask(running, later(prompt(60), got.tokens), 2).cached == 63
        monkeypatch.undo()
        ask(running, prompt(61), 4)
    assert len(state_files(tmp_path)) >= 4  # closing has brought all of them to disk


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AHNError, match="cannot be made"):
        Engine(OF, Letters(), state_dir=tmp_path / "file")  # type: ignore[arg-type]


def test_export_and_load(tmp_path: Path) -> None:
    file, said = tmp_path / "talk.safetensors", [{"role": "user", "content": "Hi."}]
    with engine(OF) as running:
        got = ask(running, prompt(60), 4, owner="me", name="talk")
        running.store.export("me", "talk", file, said)
        with pytest.raises(AHNError, match="no conversation"):
            running.store.export("you", "talk", file)
    assert AHNCache.load(file, OF).seen == 63 and AHNCache.load(file, OF).messages == said
    with engine(OF) as running:
        assert running.store.take_in("you", "copy", file) == said
        assert [info.name for info in running.store.conversations("you")] == ["copy"]
        ids = later(prompt(60), got.tokens)
        after = ask(running, ids, 4, owner="you")
        assert after.cached == 63 and after.tokens == alone(OF, ids, 4)
        with pytest.raises(AHNError, match="no cache file"):
            running.store.take_in("you", "none", tmp_path / "none")
    with engine(model(quantized=12)) as running, pytest.raises(AHNError, match="other settings"):
        running.store.take_in("you", "copy", file)
    with engine(model(quantized=6, seed=1)) as running, pytest.raises(AHNError, match="another base model"):
        running.store.take_in("you", "copy", file)
    plain = AHNCache.for_model(OF)
    with torch.no_grad():
        OF(torch.tensor([prompt(5)]), past_key_values=plain)
    plain.save(file)
    with engine(OF) as running, pytest.raises(AHNError, match="say"):
        running.store.take_in("you", "copy", file)


def test_what_a_file_says_of_itself_is_checked(tmp_path: Path) -> None:
    """Others' rows and bounds of memory depend on it."""
    file, other = tmp_path / "talk.safetensors", tmp_path / "other.safetensors"
    with engine(OF) as running:
        ask(running, prompt(60), 4, name="talk")
        running.store.export("", "talk", file)
    note = files.Note.read(conversation_file.describe(file)[files.NOTE])
    cache = AHNCache.load(file, OF)
    with engine(OF) as running:
        running.store.take_in("", "small", rewritten(other, cache, note, parts={"exact": 0}))
        assert running.store.sizes()[1] == cache.nbytes()
        with pytest.raises(AHNError, match="says 40"):
            running.store.take_in("", "short", rewritten(other, cache, note, length=40))
    two = AHNCache.for_model(OF)
    with torch.no_grad():
        OF(torch.tensor([prompt(60), prompt(60, seed=1)]), past_key_values=two)
    with engine(OF) as running, pytest.raises(AHNError, match="2 conversations"):
        running.store.take_in("", "two", rewritten(other, two, note, length=60))


def rewritten(path: Path, cache: AHNCache, note: files.Note, **changes: Any) -> Path:
    """A file that says something else of itself."""
    files.write(cache, dataclasses.replace(note, **changes), path, origin(OF))
    return path


def test_conversations_in_which_the_same_was_said_are_two(tmp_path: Path) -> None:
    def names(running: Engine) -> set[str | None]:
        return {info.name for info in running.store.conversations("")} - {None}

    with engine(OF, state_dir=tmp_path) as running:
        ask(running, prompt(60), 4)
        for name in ("first", "second"):
            ask(running, prompt(60), 4, name=name)
        running.store.export("", "first", tmp_path / "file")
        running.store.take_in("", "third", tmp_path / "file")
        assert names(running) == {"first", "second", "third"}
        assert running.store.forget("", "second") and not running.store.forget("", "second")
    with engine(OF, state_dir=tmp_path) as running:
        assert names(running) == {"first", "third"}
        running.store.export("", "first", tmp_path / "file")
        assert running.store.forget("", "first") and running.store.forget("", "third")
        assert names(running) == set() and not [path for path in state_files(tmp_path) if len(path.stem) > 41]


@pytest.mark.skipif(os.name == "nt", reason="times of folders")
def test_the_note_is_not_trusted(tmp_path: Path) -> None:
    good = {"owner": "", "length": 3, "digest": "ab", "name": None, "part_of": None, "parts": {"exact": 1}}
    assert files.Note.read(good).length == 3
    for bad in [None, {}, good | {"length": -1}, good | {"length": True}, good | {"owner": 3}, good | {"parts": []}]:
        with pytest.raises(AHNError):
            files.Note.read(bad)
    with pytest.raises(AHNError):
        files.Note.read(good | {"more": 1})


def test_what_another_engine_uses_is_not_old(tmp_path: Path) -> None:
    with engine(OF, state_dir=tmp_path) as running:
        got = ask(running, prompt(60), 4)
    state = state_files(tmp_path)[0]
    long_ago = time.time() - 1000
    for path in state_files(tmp_path):
        os.utime(path, (long_ago, long_ago))
    with engine(OF, state_dir=tmp_path, max_age=500) as running:
        os.utime(state)  # another engine's doing
        time.sleep(1.5)
        assert state_files(tmp_path) == [state]
        assert ask(running, later(prompt(60), got.tokens), 2).cached > 0


def test_files_that_cannot_be_set_aside_or_are_gone_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged one in a folder that can only be read, and one that another server has deleted."""
    kept = files.StateFiles(model(), tmp_path)
    damaged, gone = (kept.directory / f"{name}.safetensors" for name in ("damaged", "gone"))
    damaged.write_bytes(b"nothing")

    def refused(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    assert kept.note(damaged) is None and "cannot be renamed" in caplog.text
    with pytest.raises(AHNError) as caught:
        kept.load(gone)
    assert kept.set_aside(gone, caught.value), "it is forgotten"

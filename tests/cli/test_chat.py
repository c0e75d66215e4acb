"""`ahn chat`: one cache over turns holds exactly the conversation, whatever the template does; and the commands."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch

from ahn.cache.conversation import AHNCache
from ahn.cli.chat import Chat
from ahn.cli.commands import Commands, full_bytes, memory_rows
from ahn.cli.turns import PlainTurns, TemplateTurns
from ahn.cli.writing import Interrupt, Sampling
from ahn.errors import AHNError

TRIMMED = speaking.CHATML.replace("m['content']", "m['content'] | trim")
# As in models that think: what stands before </think> is dropped from earlier turns.
FORGETFUL = speaking.CHATML.replace(
    "m['content']", "m['content'].split('</think>')[-1] if not loop.last else m['content']"
)
NO_END = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# As Phi-3's: a text ends otherwise than a turn amid it.
ENDING = speaking.CHATML + "{% if not add_generation_prompt %}THE END{% endif %}"
# As gpt-oss's: the last reply of a text ends by another token than one amid it. The model writes the former.
RETURNING = speaking.CHATML.replace(
    "<|im_end|>\n", "{{ '<|im_end|>' if m['role'] == 'assistant' and loop.last else '<|im_start|>' }}"
)
REFUSING = speaking.CHATML + "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"


class Talk:
    """A conversation whose replies are given rather than generated."""

    def __init__(self, template: str, monkeypatch: pytest.MonkeyPatch, system: str | None = None) -> None:
        self.session = speaking.session(template)
        self.told: list[str] = []
        self.turns = TemplateTurns(self.session, system, self.told.append)
        self.monkeypatch = monkeypatch

    def say(self, message: str, reply: str, ends: bool = True) -> None:
        session = self.session
        tokens = session.encode(reply, start=False) + ([session.tokenizer.eos_token_id] if ends else [])
        speaking.script(self.monkeypatch, tokens)
        session.read(self.turns.next_input(message))
        assert session.write(Sampling(max_new_tokens=len(tokens))) == reply
        self.turns.close(reply)

    def holds(self, text: str) -> bool:
        """The cache predicts what one that read this text at once predicts, after as many tokens."""
        other = speaking.session(speaking.CHATML)
        ids = other.encode(text, start=False)
        other.read(ids)
        # float32 sums in another order
        found = [speaking.next_logits(each) for each in (self.session, other)]
        return self.session.seen == len(ids) and torch.allclose(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.sample(4)
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("template", [speaking.CHATML, TRIMMED, NO_END])
def test_the_cache_holds_the_templated_history(template: str, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(template, monkeypatch, system="Be brief.")
    talk.say("Hello", "Hi there", ends and template != NO_END)
    talk.say("Who are you?", "A model", ends and template != NO_END)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model"},
    ]
    history = talk.session.tokenizer.apply_chat_template(messages, tokenize=False)
    assert talk.holds(history)
    assert not talk.holds(history.replace("there", "here"))
    assert talk.told == []


@pytest.mark.parametrize("ends", [True, False])
def test_a_turn_is_not_closed_as_the_whole_text_is(ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(ENDING, monkeypatch)
    talk.say("Hello", "Hi there", ends)
    talk.session.save(str(tmp_path / "talk"))
    talk.say("Who are you?", "A model", ends)
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert talk.holds(turn.format("Hello", "Hi there") + turn.format("Who are you?", "A model"))
    assert talk.told == []
    talk.turns.reset(AHNCache.load(tmp_path / "talk", talk.session.model))
    talk.say("Who are you?", "A model", ends)
    assert talk.holds(turn.format("Hello", "Hi there") + turn.format("Who are you?", "A model"))


@pytest.mark.parametrize("ends", [True, False])
def test_a_reply_ends_by_the_token_of_a_turn(ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the one that the model wrote, which the template puts at the end of all alone."""
    talk = Talk(RETURNING, monkeypatch)
    talk.say("Hello", "Hi there", ends)
    talk.session.save(str(tmp_path / "talk"))
    turn = "<|im_start|>user\n{}<|im_start|><|im_start|>assistant\n{}"
    turns = turn.format("Hello", "Hi there"), turn.format("Who are you?", "A model"), turn.format("Since when?", "")
    for _ in range(2):
        talk.say("Who are you?", "A model", ends)
        if ends:
            talk.say("Since when?", "")
        talk.session.read(talk.turns.next_input("Sure?"))
        said = "<|im_start|>".join([*turns[: 3 if ends else 2], turn.format("Sure?", "")])
        assert talk.holds(said)
        assert talk.told == []
        talk.turns.reset(AHNCache.load(tmp_path / "talk", talk.session.model))


def test_an_end_token_that_the_template_does_not_put_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(NO_END, monkeypatch)
    talk.say("Hello", "Hi there")
    assert talk.holds("[user]\nHello\n[assistant]\nHi there\n")
    assert talk.told == []


def test_a_template_that_rewrites_history_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(FORGETFUL, monkeypatch)
    talk.say("2+2?", "two pairs</think>4")
    assert talk.told == []
    talk.say("3+3?", "two threes</think>6")
    talk.say("4+4?", "8")
    assert len(talk.told) == 1 and "as they were said" in talk.told[0]
    said = (("2+2?", "two pairs</think>4"), ("3+3?", "two threes</think>6"), ("4+4?", "8"))
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert talk.holds("".join(turn.format(*pair) for pair in said))


def test_a_template_that_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AHNError, match="one message only"):
        Talk(REFUSING, monkeypatch, system="x").turns.next_input("y")


def test_plain_turns_are_lines() -> None:
    session = speaking.session()
    turns = PlainTurns(session)
    for message in ("one", "two"):
        session.read(turns.next_input(message))
    assert session.seen == len(session.encode("one\ntwo", start=True))


@pytest.mark.parametrize("before", [0, 1])
def test_a_message_that_was_stopped_leaves_a_conversation(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read stays read; the next message comes as after any other turn."""
    talk = Talk(speaking.CHATML, monkeypatch)
    if before:
        talk.say("Hello", "Hi there")
    monkeypatch.setattr("ahn.measure.reading.CPU_CHUNK", 7)
    interrupt = Interrupt()
    ids = talk.turns.next_input("one two three four five six seven eight")

    def advance(tokens: int) -> None:
        interrupt.wanted = True

    assert 0 < talk.session.read(ids, advance, interrupt) < len(ids)
    talk.turns.abandon()
    read = talk.session.seen
    talk.say("Again", "Yes")
    first = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n" if before else ""
    again = "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    words = talk.session.tokenizer
    assert words.decode(talk.session._ids[read if before else 0 :]) == again
    if before:
        assert words.decode(talk.session._ids[:read]).startswith(first + "<|im_start|>user\none")


def asking(interrupt: Interrupt) -> tuple[Any, Interrupt]:
    """For `Session.read`: asks to stop once something was read."""
    return lambda tokens: setattr(interrupt, "wanted", interrupt.wanted or tokens > 0), interrupt


@pytest.mark.sample(4)
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("stopped", [None, 0, 2])
def test_a_text_becomes_the_beginning_of_the_next_message(
    before: int, stopped: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    talk = Talk(speaking.CHATML, monkeypatch, system="Be brief.")
    if before:
        talk.say("Hello", "Hi there")
    start = talk.session.seen
    texts = ["Call me Ishmael.", "Some years ago"]
    monkeypatch.setattr("ahn.measure.reading.CPU_CHUNK", 3)  # one of them is the last token before the text
    if stopped:  # after the first chunk of each
        monkeypatch.setattr("ahn.cli.commands.read", lambda session, ids, by: session.read(ids, *asking(by)))
    for number, text in enumerate(texts):
        file = tmp_path / str(number)
        file.write_text(f"\ufeff{text}\n\n")
        interrupt = Interrupt()
        interrupt.wanted = stopped == 0
        Commands(talk.turns).obey(f"/read {file}", interrupt)
    said = talk.turns.messages[-1]["content"]
    assert talk.turns.open and (f"the first {stopped} of" in said if stopped is not None else "first" not in said)
    talk.say("Who?", "Ishmael")
    talk.say("Sure?", "Yes")
    words = talk.session.tokenizer
    read = [words.decode(words(text)["input_ids"][:stopped]) for text in texts]
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    said = turn.format("\n\n".join([*read, "Who?"]), "Ishmael") + turn.format("Sure?", "Yes")
    system = "" if before else "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert words.decode(talk.session._ids[start:]) == system + said


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ('"{}/a b.txt"', "a b.txt"),
        ("'{}/a b.txt'", "a b.txt"),
        ("{}/'a b'.txt", "a b.txt"),
        (r"{}/a\ b.txt", "a b.txt"),
        ("{}/a b.txt", "a b.txt"),
        (r"~/a\ b.txt", "a b.txt"),
        ("'~/a b.txt'", "a b.txt"),
        ("~/it's.txt", "it's.txt"),
        ("{}/it's all's.txt", "it's all's.txt"),
        ("{}/'a'.txt", "'a'.txt"),
        (r"{}/a\b.txt", r"a\b.txt"),
    ],
)
def test_names_of_files_are_as_in_a_shell(
    given: str, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And as they are: a file that has quotes or backslashes in its name is found by them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / file).write_text("Call me Ishmael.")
    talk = Talk(speaking.CHATML, monkeypatch)
    Commands(talk.turns).obey(f"/read {given.format(tmp_path)}", Interrupt())
    assert talk.turns.messages[-1]["content"].startswith(f"[{file}, ")


def test_a_conversation_is_saved_and_loaded_by_a_quoted_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    talk = Talk(speaking.CHATML, monkeypatch)
    talk.say("Hello", "Hi there")
    commands = Commands(talk.turns)
    for number, given in enumerate(('"{}/my talk"', r"{}/my\ other\ talk")):
        commands.obey(f"/save {given.format(tmp_path)}", Interrupt())
        commands.obey(f"/load {given.format(tmp_path)}", Interrupt())
        assert (tmp_path / ("my talk", "my other talk")[number]).is_file()


def test_a_question_that_was_stopped_leaves_the_text_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A book must not be read again because one question about it was stopped."""
    talk = Talk(speaking.CHATML, monkeypatch)
    file = tmp_path / "book.txt"
    file.write_text("Call me Ishmael.")
    Commands(talk.turns).obey(f"/read {file}", Interrupt())
    read = talk.session.seen
    ids = talk.turns.next_input("Who is it that")
    assert talk.session.read(ids) and talk.session.seen > read
    talk.turns.abandon()
    talk.say("Who?", "Ishmael")
    said = "Call me Ishmael.\n\nWho is it that<|im_end|>\n<|im_start|>assistant\n\n\nWho?"
    assert said in talk.session.tokenizer.decode(talk.session._ids)


@pytest.mark.parametrize("asked", [False, True])
def test_a_file_holds_what_was_said(asked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also a text that nothing was asked about yet: read once, ask many times."""
    book, file = tmp_path / "book.txt", tmp_path / "talk.safetensors"
    book.write_text("Call me Ishmael. Some years ago, never mind how long precisely")
    talk, other = (Talk(speaking.CHATML, monkeypatch) for _ in range(2))
    Commands(talk.turns).obey(f"/read {book}", Interrupt())
    if asked:
        talk.say("Who?", "Ishmael")
    Commands(talk.turns).obey(f"/save {file}", Interrupt())
    commands = Commands(other.turns)
    commands.obey(f"/load {file}", Interrupt())
    assert other.turns.messages == talk.turns.messages and other.turns.open == (not asked)
    for each in (talk, other):
        each.say("When?", "Some years ago")
    found = [speaking.next_logits(each.session) for each in (talk, other)]
    assert talk.session.seen == other.session.seen and torch.equal(*found)


def test_a_fork_leaves_the_other_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(speaking.CHATML, monkeypatch)
    talk.say("Hello", "Hi there")
    commands = Commands(talk.turns)
    before, seen = speaking.next_logits(talk.session), talk.session.seen
    assert commands.prompt == "> "
    commands.obey("/fork other", Interrupt())
    assert commands.prompt == "other> " and commands.session.seen == seen
    forked = commands.turns
    assert torch.equal(speaking.next_logits(commands.session), before)
    commands.session.read(forked.next_input("Something else"))
    assert len(forked.messages) == 3 and len(talk.turns.messages) == 2
    commands.obey("/switch main", Interrupt())
    assert commands.turns is talk.turns and commands.session.seen == seen
    assert torch.equal(speaking.next_logits(commands.session), before)


def test_memory_adds_up() -> None:
    session = speaking.session(quantized=8)
    session.read(session.encode("def main(): pass " * 20, start=True))
    memory, sizes = session.memory(), session.cache.bytes_by_part()
    assert sum(sizes.values()) == memory["cache_bytes"] and all(sizes.values())
    told = dict(memory_rows(session))
    exact, coarse, written, total = (int(told[row].split()[0]) for row in list(told)[:4])
    assert (exact, coarse) == (speaking.WINDOW + speaking.SINKS, 8) and exact + coarse + written == total
    config = session.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert full_bytes(session) == session.seen * per_token


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> speaking.Speaking:
    return speaking.save(tmp_path_factory.mktemp("chat"), speaking.CHATML)


@pytest.fixture
def chat(ahn_cli: Any, saved: speaking.Speaking, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`chat(line, ..., options=())` pipes the lines in; replies have 8 tokens."""

    def run(*lines: object, raw: bytes = b"", model: Path = saved.adapter, options: tuple[str, ...] = ()) -> Any:
        raw = raw or "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return ahn_cli("chat", "--model", model, "--max-new-tokens", 8, *options)

    return run


def replies(run: Any) -> list[dict[str, Any]]:
    assert run.code == 0, run.err
    return [json.loads(line) for line in run.out.splitlines()]


JSON = ("--json",)


def test_replies_are_lines_of_json(chat: Any) -> None:
    first, second = replies(chat("Hello", "", "Again", options=JSON))
    assert first["new_tokens"] == 8 and not first["finished"]
    assert second["tokens_seen"] > first["tokens_seen"]
    assert second["tokens_in_memory"] == second["tokens_seen"] - speaking.WINDOW - speaking.SINKS
    assert chat("Hello").out == first["reply"] + "\n"


def test_reset_forgets(chat: Any) -> None:
    first, second = replies(chat("Hello", "/reset", "Hello", options=JSON))
    del first["seconds"], second["seconds"]
    assert first == second


def test_save_and_load_go_on(chat: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    _, without = replies(chat("Hello", "Again", options=JSON))
    replies(chat("Hello", f"/save {file}", options=JSON))
    (resumed,) = replies(chat(f"/load {file}", "Again", options=JSON))
    del without["seconds"], resumed["seconds"]
    assert resumed == without


def test_saving_replaces_conversations_and_nothing_else(chat: Any, tmp_path: Path) -> None:
    """`/save book.txt` is a slip of the hand: `/read` was meant."""
    book, talk = tmp_path / "book.txt", tmp_path / "talk"
    book.write_text("Call me Ishmael.")
    talk.touch()
    done = chat("Hello", f"/save {talk}", "Again", f"/save {talk}", f"/save {book}", options=JSON)
    assert done.code == 1 and done.err.count("Saved") == 2
    assert f"{book} is there already and is no conversation: choose another name." in " ".join(done.err.split())
    assert book.read_text() == "Call me Ishmael."


def test_commands(chat: Any, tmp_path: Path) -> None:
    done = chat("Hello", "/memory", "/window", "/help", "/quit", "never read")
    assert done.code == 0 and len(done.out.splitlines()) == 1
    assert "remembered" in done.err and f"Window {speaking.WINDOW}" in done.err and "/reset" in done.err


def test_no_mistake_ends_the_conversation(chat: Any, tmp_path: Path) -> None:
    """Each gives one line, what comes after is answered, and the exit code says that something went wrong."""
    damaged, binary, empty = (tmp_path / name for name in ("damaged", "binary", "empty"))
    damaged.write_bytes(b"not a conversation")
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_bytes(b" \n")
    device = tmp_path / "device"
    os.mkfifo(device)
    mistakes = [
        "/memory", "/nonsense", "/load", f"/load {tmp_path / 'none'}", f"/load {damaged}", f"/load {tmp_path}", "/read",
        f"/read {tmp_path / 'none'}", f"/read {binary}", f"/read {empty}", f"/read {tmp_path}", "/save", "/fork",
        "/switch", "/switch none", "/fork main", "/window 7", f"/save {damaged}/x", f"/save {device}",
        f"/read {device}", f"/load {'x' * 300}", "/save ~nobody-of-this-name/x", "/read a\0b", f"/save {binary}",
        "/read https://example.com/book.txt",
    ]  # fmt: skip
    _, *replies_ = replies_of(chat(mistakes[0], "Hello", *mistakes[1:], "Again", options=JSON), code=1, errors=mistakes)
    assert len(replies_) == 1 and replies_[0]["tokens_seen"] > 8
    assert damaged.read_bytes() == b"not a conversation" and device.is_fifo()
    text = b"Hello\ncaf\xe9\nAgain\n"
    both, only = chat(raw=text, options=JSON), chat("Hello", "Again", options=JSON)
    assert both.code == 1 and "not UTF-8" in both.err and len(both.err.splitlines()) == 1
    assert [reply["reply"] for reply in lines(both)] == [reply["reply"] for reply in lines(only)]


def replies_of(run: Any, code: int, errors: list[str]) -> list[dict[str, Any]]:
    assert run.code == code
    told = run.err.splitlines()
    assert len(told) == len(errors) and all(line.startswith("ahn: ") for line in told), run.err
    return lines(run)


def lines(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.out.splitlines()]


def test_a_text_may_begin_with_a_slash(chat: Any) -> None:
    (sent,) = replies(chat("//reset", options=JSON))
    (other,) = replies(chat(" //reset", options=JSON))
    assert sent["new_tokens"] == 8 and sent["reply"] == other["reply"]


def test_without_a_template(chat: Any, tmp_path: Path) -> None:
    plain = speaking.save(tmp_path)
    done = chat("def main():", model=plain.adapter)
    assert done.code == 0 and "no chat template" in done.err
    refused = chat("x", model=plain.adapter, options=("--system", "y"))
    assert refused.code == 1 and "--system needs a chat template" in refused.err


def test_ctrl_c_among_piped_messages_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(Commands(PlainTurns(speaking.session())), Sampling(4, 0.0), as_json=False)
    chat.typed = False
    replies = []

    def write(session: Any, *arguments: Any, **options: Any) -> tuple[str, float]:
        replies.append(session)
        session.interrupted = True
        return "", 0.1

    monkeypatch.setattr("ahn.cli.generate.write", write)
    monkeypatch.setattr("ahn.cli.chat._piped", lambda: iter([b"one\n", b"two\n"]))
    with pytest.raises(KeyboardInterrupt):
        chat.run()
    assert len(replies) == 1

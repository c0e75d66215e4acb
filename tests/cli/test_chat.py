"""`ahn chat`: one cache over turns holds exactly the conversation, whatever the template does; and the commands."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> speaking.Speaking:
    return speaking.save(tmp_path_factory.mktemp("chat"), speaking.CHATML)


@pytest.fixture
def chat(ahn_cli: Any, saved: speaking.Speaking, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`chat(line, ..., options=())` pipes the lines in; replies have 8 tokens."""

    def run(*lines: object, model: Path = saved.adapter, options: tuple[str, ...] = ()) -> Any:
        raw = "".join(f"{line}\n" for line in lines).encode()
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


def test_commands(chat: Any, tmp_path: Path) -> None:
    done = chat("/stats", "Hello", "/stats", "/help", "/nonsense", "/quit", "never read")
    assert done.code == 0
    assert "Nothing read yet" in done.err and "in the memory" in done.err
    assert "Unknown command '/nonsense'" in done.err and done.err.count("/reset") == 2
    missing = chat(f"/load {tmp_path / 'none'}")
    assert missing.code == 1 and "There is no cache file" in missing.err


def test_without_a_template(chat: Any, tmp_path: Path) -> None:
    plain = speaking.save(tmp_path)
    done = chat("def main():", model=plain.adapter)
    assert done.code == 0 and "no chat template" in done.err
    refused = chat("x", model=plain.adapter, options=("--system", "y"))
    assert refused.code == 1 and "--system needs a chat template" in refused.err

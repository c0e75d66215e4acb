"""Turns of a conversation as new tokens for a live cache: nothing is read twice, and nothing can be unread."""

import copy
from collections.abc import Callable
from typing import Self

from ahn.cache.conversation import AHNCache, Message
from ahn.cli.session import Session
from ahn.errors import AHNError
from ahn.measure.parts import render

STAND_IN = "\u2983reply\u2984"
"""Takes the place of a reply when the template is asked what it puts around one."""
QUESTION = "\u2983question\u2984"
"""Takes the place of a message when the template is asked what it puts around one."""
APART = "\n\n"
"""Between a text and the question about it."""


class PlainTurns:
    """Turns of a model without a chat template: the text simply goes on, a message being a line of it.

    What was said is in `session.cache.messages`, so that it stays with the cache wherever that goes. A last message of
    the user's is a turn that is still open: a text that was read, and that the next message is about.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._undo: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """What was said so far; of a text that was read only its name."""
        return self.session.cache.messages

    @property
    def open(self) -> bool:
        """Whether a text was read that nothing was asked about yet."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def copy(self) -> Self:
        """The same conversation once more, to go on in another way."""
        other = copy.copy(self)
        other.session = self.session.copy()
        return other

    def reset(self, cache: AHNCache | None = None) -> None:
        self.session.reset(cache)

    def begin(self) -> list[int]:
        """What to read before a text that the next message will be about."""
        return self._encode(APART if self.open else "\n") if self.session.seen else []

    def opened(self, name: str) -> None:
        """Called after a text was read behind `begin`: it is what the user's turn begins with."""
        self._say(name)

    def next_input(self, message: str) -> list[int]:
        """What to read before the reply to `message`."""
        self._say(message)
        start = self.session.seen == 0
        return self.session.encode(message if start else f"\n{message}", start)

    def close(self, reply: str) -> None:
        self.messages.append({"role": "assistant", "content": reply})

    def abandon(self) -> None:
        """Called instead of `close` where reading the message was stopped: what was read of it stays read."""
        self.messages[:] = self._undo

    def _say(self, message: str) -> None:
        """Put a message into the user's turn, a new one unless one is open."""
        self._undo = list(self.messages)
        before = f"{self.messages.pop()['content']}{APART}" if self.open else ""
        self.messages.append({"role": "user", "content": before + message})

    def _encode(self, text: str) -> list[int]:
        return self.session.encode(text, start=False)


class TemplateTurns(PlainTurns):
    """Turns in the model's chat template.

    After each reply the cache is brought to the end of that turn, as the template closes it. A message then needs only
    what the template puts between that point and the next reply, which is found by rendering the history with a
    stand-in for the last reply. So nothing read is ever read again, a saved cache can be resumed without its history,
    and a template that rewrites earlier turns (some strip the model's thinking) cannot contradict the cache: the
    cache keeps what was really said, and `tell` says so once.

    Args:
        session: its tokenizer has a chat template.
        system: a system message to start with.
        tell: called with a sentence for the person.

    Raises:
        AHNError: the template does not show replies as they are (in `close`), or refuses the messages.
    """

    def __init__(self, session: Session, system: str | None, tell: Callable[[str], None]) -> None:
        super().__init__(session)
        self._tell, self._told = tell, False
        self._start: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self._forget()

    def _forget(self) -> None:
        self.session.cache.messages = list(self._start)
        self._text: str | None = ""
        """Everything in the cache as text; None when that is not all in the messages."""
        self._closing = ""

    def reset(self, cache: AHNCache | None = None) -> None:
        super().reset(cache)
        said = [] if cache is None else cache.messages
        self._forget()
        if cache is not None:
            # What was said may be in the memory alone. Any turn will do to learn how the template joins turns.
            joined: list[Message] = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
            cache.messages = said or joined
            self._text = None
            if any(message["role"] == "assistant" for message in cache.messages):
                self._closing = self._end_of_turn(cache.messages[: -1 if self.open else None])

    def begin(self) -> list[int]:
        before = APART if self.open else self._around([*self.messages, _asked(QUESTION)])[0]
        return self._encode(before)

    def opened(self, name: str) -> None:
        super().opened(name)
        self._text = None

    def next_input(self, message: str) -> list[int]:
        was_open = self.open
        self._say(message)
        if was_open:
            asked = _asked(self.messages[-1]["content"].removesuffix(message) + QUESTION)
            piece = APART + message + self._around([*self.messages[:-1], asked])[1]
        else:
            piece = self._next(self.messages)
            self._check_history(piece)
        if self._text is not None:
            self._text += piece
        return self._encode(piece)

    def close(self, reply: str) -> None:
        session = self.session
        written = session.written
        super().close(reply)
        self._closing = missing = self._end_of_turn(self.messages)
        if session.finished:  # the model may have begun the closing itself: by its end token
            end = session.tokenizer.decode(written[-1:])
            if self._closing.startswith(end):
                missing = self._closing.removeprefix(end)
            else:  # gpt-oss's template ends a reply amid a conversation by another token than the model writes
                session.take_back()
                written = written[:-1]
        session.read(self._encode(missing))
        if self._text is not None:
            self._text += session.tokenizer.decode(written, clean_up_tokenization_spaces=False) + missing

    def abandon(self) -> None:
        super().abandon()
        self._text = None  # it no longer is what the template makes of the messages
        if not self.open and not any(message["role"] == "assistant" for message in self.messages):
            self.reset()  # there is no turn yet to go on from

    def _around(self, messages: list[Message]) -> tuple[str, str]:
        """What comes before and after `QUESTION` in the last message, from the end of the last reply on."""
        before, found, after = self._next(messages).rpartition(QUESTION)
        if not found:
            raise AHNError("This model's chat template changes what a message says; use ahn generate instead.")
        return before, after

    def _next(self, messages: list[Message]) -> str:
        """What the template puts from the end of the last reply to where the next one begins."""
        if not any(message["role"] == "assistant" for message in messages):
            return self._render(messages, ask=True)
        piece = self._after_reply(messages, ask=True)
        if not piece.startswith(self._closing):
            raise AHNError("This chat template closes a turn in different ways; use ahn generate instead.")
        return piece.removeprefix(self._closing)

    def _end_of_turn(self, messages: list[Message]) -> str:
        """What the template closes the last turn with, whatever follows: some end a conversation otherwise than a turn.

        Phi-3's puts the end of a text after a last reply alone. What both have in common is cut between two tokens. It
        may be nothing, as with gpt-oss: what ends the turn is then read with the message that follows.
        """
        alone = self._after_reply(messages, ask=False)
        before = self._after_reply([*messages, _asked(QUESTION)], ask=True)
        if before.startswith(alone):
            return alone
        own, other = self._encode(alone), self._encode(before)
        common = next((n for n, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), len(own))
        shared = self.session.tokenizer.decode(own[:common], clean_up_tokenization_spaces=False)
        return shared if alone.startswith(shared) else ""

    def _after_reply(self, messages: list[Message], ask: bool) -> str:
        """What the template puts after the last reply, up to the end or (`ask`) to where the next reply begins."""
        last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
        shown: list[Message] = [*messages[:last], {"role": "assistant", "content": STAND_IN}, *messages[last + 1 :]]
        _, found, after = self._render(shown, ask).rpartition(STAND_IN)
        if not found:
            raise AHNError("This model's chat template changes what a reply says; use ahn generate instead.")
        return after

    def _check_history(self, piece: str) -> None:
        if self._text is None or self._told:
            return
        if self._render(self.messages, ask=True) != self._text + piece:
            self._tell("The chat template rewrites earlier turns; the cache keeps them as they were said.")
            self._told = True

    def _render(self, messages: list[Message], ask: bool) -> str:
        return render(self.session.tokenizer, messages, ask)


def _asked(content: str) -> Message:
    return {"role": "user", "content": content}

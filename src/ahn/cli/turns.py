"""Turns of a conversation as new tokens for a live cache: nothing is read twice, and nothing can be unread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ahn.errors import AHNError
from ahn.evaluation.prompt import render

if TYPE_CHECKING:
    from ahn.cache.conversation import AHNCache
    from ahn.cli.session import Session

STAND_IN = "\u2983reply\u2984"
"""Takes the place of a reply when the template is asked what it puts around one."""


class PlainTurns:
    """Turns of a model without a chat template: the text simply goes on, a message being a line of it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def reset(self, cache: AHNCache | None = None) -> None:
        """Start again, or go on with another cache."""
        self.session.reset(cache)

    def next_input(self, message: str) -> list[int]:
        """What to read before the reply to `message`."""
        start = self.session.seen == 0
        return self.session.encode(message if start else f"\n{message}", start)

    def close(self, reply: str) -> None:
        """Called after the reply was written."""

    def abandon(self) -> None:
        """Called instead of `close` where reading the message was stopped: what was read of it stays read."""


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
        self._start = [{"role": "system", "content": system}] if system is not None else []
        self._forget()

    def _forget(self) -> None:
        self._messages: list[dict[str, str]] = list(self._start)
        self._text: str | None = ""
        """Everything in the cache as text; None when it came from a file."""
        self._closing = ""

    def reset(self, cache: AHNCache | None = None) -> None:
        super().reset(cache)
        self._forget()
        if cache is not None:
            # What was said is in the memory, not here. Any turn will do to learn how the template joins turns.
            self._messages = [{"role": "user", "content": "…"}, {"role": "assistant", "content": STAND_IN}]
            self._text = None
            self._closing = self._after_reply(self._messages, ask=False)

    def next_input(self, message: str) -> list[int]:
        self._messages.append({"role": "user", "content": message})
        if self.session.seen == 0:
            piece = self._render(self._messages, ask=True)
        else:
            piece = self._after_reply(self._messages, ask=True)
            if not piece.startswith(self._closing):
                raise AHNError("This chat template closes a turn in different ways; use ahn generate instead.")
            piece = piece.removeprefix(self._closing)
            self._check_history(piece)
        if self._text is not None:
            self._text += piece
        return self.session.encode(piece, start=False)

    def close(self, reply: str) -> None:
        """Bring the cache to the end of the assistant's turn."""
        session = self.session
        said = session.tokenizer.decode(session.written, clean_up_tokenization_spaces=False)
        # The model may have written the beginning of the closing itself: its end token.
        end = session.tokenizer.decode(session.written[-1:]) if session.finished else ""
        self._messages.append({"role": "assistant", "content": reply})
        self._closing = self._after_reply(self._messages, ask=False)
        missing = self._closing.removeprefix(end)
        session.read(session.encode(missing, start=False))
        if self._text is not None:
            self._text += said + missing

    def abandon(self) -> None:
        self._messages.pop()
        self._text = None  # it no longer is what the template makes of the messages
        if not any(message["role"] == "assistant" for message in self._messages):
            self.reset()  # there is no turn yet to go on from

    def _after_reply(self, messages: list[dict[str, str]], ask: bool) -> str:
        """What the template puts after the last reply, up to the end or (`ask`) to where the next reply begins."""
        last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
        shown = [*messages[:last], {"role": "assistant", "content": STAND_IN}, *messages[last + 1 :]]
        _, found, after = self._render(shown, ask).rpartition(STAND_IN)
        if not found:
            raise AHNError("This model's chat template changes what a reply says; use ahn generate instead.")
        return after

    def _check_history(self, piece: str) -> None:
        if self._text is None or self._told:
            return
        if self._render(self._messages, ask=True) != self._text + piece:
            self._tell("The chat template rewrites earlier turns; the cache keeps them as they were said.")
            self._told = True

    def _render(self, messages: list[dict[str, str]], ask: bool) -> str:
        return render(self.session.tokenizer, messages, ask)

"""The text of a reply, token by token: whole characters only, and nothing that may still become a stop text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT = 8
"""Tokens decoded together with a new one: what a token looks like depends on its neighbours."""
LONGEST_CHARACTER = 8
"""More tokens than this no character waits for; bytes that never become one are shown as they are."""


class TextStream:
    """Text of one reply.

    Attributes:
        stopped: a stop text was found.
        text: all that was shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ids = list(before[-CONTEXT:])
        self._context, self._decoded = 0, len(self.ids)
        self._held = self.text = ""
        self._ends: list[int] = []
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown once this token is written."""
        self.ids.append(token)
        self._ends.append(len(self.text) + len(self._held))
        new = self._new_text()
        if not new or (new.endswith("\ufffd") and len(self.ids) - self._decoded < LONGEST_CHARACTER):
            return ""
        self._context, self._decoded = max(0, self._decoded - CONTEXT), len(self.ids)
        self._ends[-1] += len(new)
        return self._show(new, last=False)

    def whole_tokens(self) -> int:
        """How many of the reply's tokens hold nothing of the stop text that was found."""
        shown = len(self.text)
        beyond = (n for n, end in enumerate(self._ends) if end > shown and self.stopped)
        return next(beyond, len(self._ends))

    def end(self) -> str:
        return "" if self.stopped else self._show(self._new_text(), last=True)

    def _new_text(self) -> str:
        before, now = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self.ids[self._context : self._decoded], self.ids[self._context :])
        )
        return now[len(before) :]

    def _show(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held, text = True, "", text[: min(found)]
        else:
            hold = 0 if last else _begun(text, self.stops)
            text, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self.text += text
        return text


def _begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text with which a stop text begins."""
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)

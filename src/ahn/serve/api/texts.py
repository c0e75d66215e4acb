"""Messages and texts as token ids, and ids as texts."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ahn.errors import AHNError
from ahn.evaluation.prompt import render
from ahn.serve.engine.prefixes import Prefixes
from ahn.serve.engine.text import CONTEXT
from ahn.serve.request import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ahn.cache.conversation import Message

APART = "\n\n"
"""Between messages that follow each other with no reply between them, for a model without a chat template."""
LONG = 4096
"""Characters from which on a piece's token ids are remembered."""
REMEMBERED = 1 << 23
"""Token ids that are remembered over all pieces (32 MiB)."""


class ChatText:
    """What a conversation looks like to the model.

    With a chat template the messages are what the template makes of them. Without one the text simply goes on, as in
    `ahn chat`: a reply follows the message, the next message begins a new line, and messages with no reply between
    them are set apart by an empty line.

    Every turn sends the whole conversation again, so the token ids of long pieces between two special tokens are
    remembered: special tokens part a text before it is tokenised, and a piece means the same wherever it stands.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = bool(getattr(tokenizer, "chat_template", None))
        self._known: OrderedDict[bytes, NDArray[np.int32]] = OrderedDict()
        self._size, self._lock = 0, threading.Lock()
        self._special = self._separators()

    def _separators(self) -> re.Pattern[str] | None:
        """What parts a text for sure; None if this tokenizer looks across its special tokens."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        marks = [str(t) for t in added if t.special and not (t.lstrip or t.rstrip or t.single_word or t.normalized)]
        if not marks:
            return None
        pattern = re.compile("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")")
        sample = f"A text, {marks[0]} and another\n{marks[-1]}\n\n  of 3 pieces{marks[0]}.{marks[-1]}"
        apart = np.concatenate([self._tokenise(piece) for piece in pattern.split(sample)])
        return pattern if np.array_equal(apart, self._tokenise(sample)) else None

    def ids(self, text: str, start: bool = False) -> NDArray[np.int32]:
        """Token ids (L,) of a text; at the `start` of one with the tokenizer's own first token, if it has one.

        Raises:
            AHNError: the text is no valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise AHNError(f"The text is no valid Unicode (character {error.start + 1:,} of it).") from error
        if start or self._special is None or len(text) < LONG:
            return self._tokenise(text, start)
        return np.concatenate([self._piece(piece) for piece in self._special.split(text)])

    def _tokenise(self, text: str, start: bool = False) -> NDArray[np.int32]:
        return np.array(self.tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"], np.int32)

    def _piece(self, text: str) -> NDArray[np.int32]:
        if len(text) < LONG:
            return self._tokenise(text)
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        with self._lock:
            if (found := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return found
        ids = self._tokenise(text)
        with self._lock:
            if key not in self._known:
                self._known[key] = ids
                self._size += len(ids)
            while self._size > REMEMBERED:
                self._size -= len(self._known.popitem(last=False)[1])
        return ids

    def prompt(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """Token ids (L,) of a conversation, up to where the next reply begins.

        Raises:
            AHNError: the template refuses the messages, or a text is no valid Unicode.
        """
        return self.ids(self.rendered(messages, ask=True), start=not self.template)

    def rendered(self, messages: Sequence[Message], ask: bool) -> str:
        """A conversation as text, up to where the next reply begins if `ask`, else up to the end of its last turn."""
        if self.template:
            return render(self.tokenizer, list(messages), ask)
        text = ""
        for before, message in zip((None, *messages), messages, strict=False):
            if before is not None and message["role"] != "assistant":
                text += "\n" if before["role"] == "assistant" else APART
            text += message["content"]
        return text if ask else text + "\n"

    def known_as(
        self, messages: Sequence[Message], prompt: TokenIds, stop: Sequence[str]
    ) -> Callable[[Sequence[int]], TokenIds]:
        """For a reply's token ids: those with which the next turn's prompt will begin, up to the end of the reply.

        Args:
            messages: what the reply answers.
            prompt: their token ids.
            stop: texts before which the reply ends.
        """

        def known(reply: Sequence[int]) -> TokenIds:
            said = self.reply(prompt, reply, stop)
            closed = self.rendered([*messages, {"role": "assistant", "content": said}], ask=False)
            place = closed.rfind(said.strip()) if said.strip() else -1
            if place < 0:
                return prompt
            start = not self.template
            upto, whole = (self.ids(text, start) for text in (closed[: place + len(said.strip())], closed))
            return whole[: Prefixes(upto).shared(Prefixes(whole))]

        return known

    def reply(self, prompt: TokenIds, reply: Sequence[int], stop: Sequence[str] = ()) -> str:
        """A reply's text, up to a stop text."""
        before = [int(token) for token in prompt[-CONTEXT:]]
        text = self.decode([*before, *reply])[len(self.decode(before)) :]
        return text[: min([place for mark in stop if (place := text.find(mark)) >= 0], default=len(text))]

    def decode(self, ids: TokenIds, special: bool = False) -> str:
        """The text of token ids; `special` shows special tokens too."""
        numbers = np.asarray(ids).tolist()
        text: str = self.tokenizer.decode(numbers, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text
